"""Small models of the same kind as a model: few layers and tokens, each kind of layer, and random weights."""

from __future__ import annotations

import pytest
import torch
from tiny_architectures import TOY_KINDS, toy_model

from learners.small_model import small_model


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_a_small_model_runs_and_is_the_same_on_every_rank(kind: str) -> None:
    model = toy_model(kind)
    state = torch.get_rng_state()
    small, again = small_model(model), small_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(small) is type(model) and small.config.get_text_config().num_hidden_layers == 2
    ids = torch.arange(6)[None]
    assert torch.equal(*(each(input_ids=ids, use_cache=False).logits for each in (small, again)))


def test_lists_of_layers_are_cut_and_every_kind_of_layer_stays() -> None:
    kinds = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    model = toy_model("gemma3_text", num_hidden_layers=7, layer_types=kinds, vocab_size=500, pad_token_id=499)
    small = small_model(model).config
    assert small.num_hidden_layers == 3 and small.vocab_size == 64
    assert small.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (model.config.num_hidden_layers, model.config.layer_types, model.config.pad_token_id) == (7, kinds, 499)


def test_the_form_of_the_model_stays() -> None:
    model = toy_model("qwen2").to(torch.bfloat16)
    model.set_attn_implementation("eager")
    small = small_model(model)
    assert (small.dtype, small.config._attn_implementation) == (torch.bfloat16, "eager")
