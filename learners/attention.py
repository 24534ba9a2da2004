"""The attention of a model: the fast one of torch, or the model's own where the fast one would drop a feature.

Either runs block by block on rows that several samples share; see `learners.samples.packing.RowAttention`.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from learners.language_model import ROUNDING, run_body
from learners.samples.batching import to_device
from learners.samples.packing import Blocks, RowAttention, pack, pad_rows
from learners.small_model import REFUSALS, small_model

FAST, OWN = "sdpa", "eager"
BLOCKED = {FAST: "sdpa_blocks", OWN: "eager_blocks"}
"""Names by which transformers knows the same attention on blocks."""


def use_complete_attention(model: PreTrainedModel) -> None:
    """Give a model an attention that drops no feature, and that runs on blocks if the model can.

    It is the fast one, or the model's own if the fast one drops a feature that the model asks for. transformers chooses
    `sdpa` for every model that may use it, and `sdpa` silently ignores arguments it does not know, as the soft-capping
    of Gemma 2. The model's own attention (`eager`) needs memory for the scores of all pairs of positions. Everything is
    tried on a small model of the same kind.
    """
    try:
        small = small_model(model)
        name = OWN if dropped_features(small) else small.config._attn_implementation
    except REFUSALS:
        name = OWN
    if name in BLOCKED and runs_blocks(model, BLOCKED[name]):
        name = BLOCKED[name]
    if name != model.config._attn_implementation:
        model.set_attn_implementation(name)


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether several samples may share a row of a model that `use_complete_attention` has seen."""
    return model.config._attn_implementation in BLOCKED.values()


@torch.no_grad()
def dropped_features(model: PreTrainedModel) -> set[str]:
    """Return the arguments that a model hands to the fast attention, and that only its own attention uses.

    The model runs on one token. Models with another attention than the fast one drop nothing.
    """
    fast = AttentionInterface()[FAST]
    dropped: set[str] = set()

    def record(module: nn.Module, *arguments: Any, **features: Any) -> Any:
        set_features = {name for name, value in features.items() if value is not None}
        dropped.update(set_features & _arguments(_own_attention(module)) - _arguments(fast))
        return fast(module, *arguments, **features)

    training = model.training
    AttentionInterface.register(FAST, record)
    try:
        model.eval()(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        AttentionInterface.register(FAST, fast)
        model.train(training)
    return dropped


def _own_attention(module: nn.Module) -> Any:
    """Return the attention function beside the class of an attention module, or None."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) if function else set()


def attend_by_blocks(name: str) -> Any:
    """Return an attention function of transformers that runs another one on blocks, if it gets any.

    Args:
        name: `sdpa` or `eager`.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        row_attention: RowAttention | None = None,
        **features: Any,
    ) -> tuple[Tensor, Tensor | None]:
        inner = AttentionInterface()[FAST] if name == FAST else _own_attention(module)
        if row_attention is None:
            return inner(module, query, key, value, mask, **features)
        rows, _, length, _ = query.shape
        outputs = []
        for blocks in row_attention.blocks:
            seen = (_tokens(key, blocks.keys), _tokens(value, blocks.keys))
            mask = added_mask(blocks, query.dtype, is_needed=name == OWN)
            output, _ = inner(module, _tokens(query, blocks.queries), *seen, mask, **features)
            outputs.append(output.flatten(0, 1))
        whole = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return embedding(row_attention.order, whole.flatten(1)).view(rows, length, *whole.shape[1:]), None

    return attend


def added_mask(blocks: Blocks, dtype: torch.dtype, *, is_needed: bool) -> Tensor | None:
    """Return what is added to attention scores, [S or 1, 1, n, T]; None for plain causal attention.

    Args:
        blocks: the blocks.
        dtype: number format of the scores.
        is_needed: whether plain causal attention needs a mask, too.
    """
    visible = blocks.visible
    if visible is None:
        if not is_needed:
            return None
        count = blocks.keys.shape[1]
        visible = torch.ones((1, count, count), dtype=torch.bool, device=blocks.keys.device).tril()
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def _tokens(values: Tensor, places: Tensor) -> Tensor:
    """Return the values of tokens at places [S, n], [S, heads, n, size], from [B, heads, L, size]."""
    tokens = values.transpose(1, 2).flatten(0, 1)
    # `index_select` gives the same, and a gradient that takes twice as long.
    return embedding(places, tokens.flatten(1)).view(*places.shape, *tokens.shape[1:]).transpose(1, 2)


for _name, _blocked in BLOCKED.items():
    AttentionInterface.register(_blocked, attend_by_blocks(_name))
    AttentionMaskInterface.register(_blocked, AttentionMaskInterface()[_name])


@torch.no_grad()
def runs_blocks(model: PreTrainedModel, attention: str) -> bool:
    """Return whether a model computes the same for sequences that share a packed row as for each alone.

    It is tried on two short sequences and a small model of the same kind. A model whose tokens see a window, or keep a
    state, is never packed.

    Args:
        model: the model.
        attention: name of an attention that runs on blocks.
    """
    if not sees_all_tokens(model.config):
        return False
    first, second = (torch.tensor(ids) for ids in ([1, 2, 3, 4], [1, 2, 5, 6]))
    row = pad_rows([pack([first.numpy(), second.numpy()])], 0)
    assert row.depths is not None and row.attention is not None  # noqa: S101 - they share two tokens
    try:
        small = small_model(model)
        small.set_attn_implementation(attention)
        body, device = small.base_model, small.device
        alone = [run_body(body, each[None].to(device))[0] for each in (first, second)]
        ids, depths = (torch.from_numpy(each).to(device) for each in (row.input_ids, row.depths))
        packed = run_body(body, ids, depths, to_device(row.attention, device))[0]
    except REFUSALS:
        return False
    tolerance = ROUNDING.get(packed.dtype, 0.05)
    pairs = zip(alone, row.places, strict=True)
    return all(torch.allclose(each, packed[places], rtol=tolerance, atol=tolerance) for each, places in pairs)


def sees_all_tokens(config: PreTrainedConfig) -> bool:
    """Return whether every layer of a model attends to all earlier tokens, without a window or a state."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = getattr(text, "sliding_window", None) and not hasattr(text, "layer_types")
    return kinds == {"full_attention"} and not windowed
