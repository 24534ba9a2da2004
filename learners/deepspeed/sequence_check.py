"""The preflight of `learner.sequence_parallel`: a model whose rows several ranks cannot share is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from learners.attention import FAST, dropped_features, sees_all_tokens
from learners.language_model import run_body
from learners.small_model import REFUSALS, small_model
from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder

TRIED = "tried attention"
LENGTH = 8


def check_sequence_parallel(model: ModelFolder, size: int) -> None:
    """Check that groups of ranks can share the rows of a model.

    Args:
        model: the policy.
        size: ranks of a group, above 1.

    Raises:
        ConfigError: the ranks do not divide the heads, or the model needs whole rows elsewhere than in its attention.
    """
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    where = f"learner.sequence_parallel {size}: {model.field} {model.path}"
    if heads % size or (pairs % size and size % pairs):
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0 and (pairs % n == 0 or n % pairs == 0)]
        raise ConfigError(
            f"{where} has {heads} attention heads and {pairs} key-value heads, which {size} ranks cannot share; choose "
            f"one of {', '.join(fitting)}"
        )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    if problem := whole_row_need(skeleton):
        raise ConfigError(f"{where} {problem}, so ranks cannot share its rows; set learner.sequence_parallel to 1")


@torch.no_grad()
def whole_row_need(model: PreTrainedModel) -> str | None:
    """Return why a model needs whole rows outside the plain attention to all earlier tokens, or None.

    A small model of the same kind runs a row and its second half, with an attention that looks at one token alone.

    Args:
        model: the model; its parameters are not read.
    """
    if model.config._attn_implementation != FAST:
        return f"has the attention {model.config._attn_implementation!r} instead of {FAST!r}"
    if not sees_all_tokens(model.config):
        return "has layers with a window or a state"
    try:
        small = small_model(model, "cpu")
        dropped = dropped_features(small)
        if dropped:
            return f"has an attention with {', '.join(sorted(dropped))}"
        return _difference(small)
    except REFUSALS as error:
        return f"cannot run a part of a row ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"


def _difference(small: PreTrainedModel) -> str | None:
    """Return how the second half of a row alone differs from the second half of the whole row, or None."""
    calls: list[str] = []

    def attention(_module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_features: Any) -> Any:
        alike = query.shape[-1] == key.shape[-1] == value.shape[-1]
        calls.append("heads of several sizes" if not alike else "a mask of its own" if mask is not None else "")
        groups = query.shape[1] // value.shape[1]
        values = value.repeat_interleave(groups, dim=1)[..., : query.shape[-1]]
        return (query[..., : values.shape[-1]] * values).transpose(1, 2), None

    AttentionInterface.register(TRIED, attention)
    try:
        small.set_attn_implementation(TRIED)
        ids, positions = torch.arange(1, LENGTH + 1)[None], torch.arange(LENGTH)[None]
        whole = run_body(small.base_model, ids, positions)[:, LENGTH // 2 :]
        second = run_body(small.base_model, ids[:, LENGTH // 2 :], positions[:, LENGTH // 2 :])
    finally:
        AttentionInterface._global_mapping.pop(TRIED)
    if len(calls) != 2 * small.config.get_text_config().num_hidden_layers:
        return "has layers without attention"
    if any(calls):
        return f"has an attention with {next(filter(None, calls))}"
    same = torch.allclose(whole, second, rtol=0, atol=1e-2 * float(whole.abs().max()))
    return None if same else "mixes tokens outside its attention, or takes positions from the place in the row"
