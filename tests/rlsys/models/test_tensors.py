"""Buffers that belong to the weights of a model, and output layers that are tied to the embedding."""

from __future__ import annotations

import pytest
import torch
from tiny_architectures import TOY_SIZE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlsys.models.tensors import persistent_buffers, tied_output


class OwnBuffers(Qwen2ForCausalLM):
    """A Qwen2 with two buffers that are saved and one that is not."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model.layers[1].register_buffer("scale", torch.ones(2))
        self.model.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("count", torch.zeros(()))


def test_the_buffers_are_those_of_the_state_dict() -> None:
    model = OwnBuffers(Qwen2Config(**TOY_SIZE))
    buffers = dict(persistent_buffers(model))
    assert list(buffers) == ["count", "model.layers.1.scale"]
    assert set(buffers) == set(model.state_dict()) - set(dict(model.named_parameters(remove_duplicate=False)))
    assert buffers["count"] is model.count


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text", "gpt2", "opt", "gpt_neox"])
def test_buffers_that_are_computed_are_left_out(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TOY_SIZE))
    assert list(model.buffers()) or kind in ("gpt2", "opt")
    assert list(persistent_buffers(model)) == []


@pytest.mark.parametrize(
    ("kind", "name"), [("qwen2", "lm_head.weight"), ("gemma2", "lm_head.weight"), ("gpt_neox", "lm_head.weight")]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_output_layer_is_known_by_name(kind: str, name: str, device: str) -> None:
    for tied in (True, False):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TOY_SIZE, tie_word_embeddings=tied))
        assert tied_output(model) == (name if tied else None)


def test_a_model_without_an_output_layer_has_none_that_is_tied() -> None:
    class Body(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

        def get_input_embeddings(self) -> nn.Module:
            return nn.Embedding(2, 2)

    assert tied_output(Body()) is None
