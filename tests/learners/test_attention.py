"""The attention of a model computes what its config asks for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learners.attention import dropped_features, use_complete_attention

SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # scores large enough for a cap of 2 to matter
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}
IDS = torch.arange(24)[None]


def build(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZE, **changes})).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "changes", "dropped"),
    [
        ("gemma2", {"attn_logit_softcapping": 2.0}, {"softcap"}),
        ("vaultgemma", {"attn_logit_softcapping": 2.0}, {"softcap"}),
        ("gemma2", {"attn_logit_softcapping": None}, set()),
        *((kind, {}, set()) for kind in ("gemma3_text", "qwen2", "llama", "phi3", "olmo2")),
        ("mistral", {"sliding_window": 16}, set()),
        ("bloom", {}, set()),  # transformers has only its own attention
    ],
)
def test_a_model_gets_its_own_attention_where_the_fast_one_drops_a_feature(
    kind: str, changes: dict[str, Any], dropped: set[str]
) -> None:
    model = build(kind, **changes)
    chosen, own = model.config._attn_implementation, copy.deepcopy(model)
    own.set_attn_implementation("eager")
    gap = (logits(model) - logits(own)).abs().max().item()
    assert (gap > 1e-2) == bool(dropped), gap  # this is what would be lost
    assert dropped_features(model) == dropped
    use_complete_attention(model)
    assert model.config._attn_implementation.removesuffix("_blocks") == ("eager" if dropped else chosen)
    torch.testing.assert_close(logits(model), logits(own), rtol=1e-4, atol=1e-4)


def test_the_probe_leaves_no_trace() -> None:
    model, fast = build("gemma2").train(), AttentionInterface()["sdpa"]
    state = torch.get_rng_state()
    dropped_features(model)
    assert AttentionInterface()["sdpa"] is fast
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())

    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("stop")

    model.forward = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"):
        dropped_features(model)
    assert AttentionInterface()["sdpa"] is fast and model.training
