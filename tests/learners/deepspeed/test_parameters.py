"""Published parameters: every name, that of a tied output layer too, in a fixed order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from learners.deepspeed.parameters import published_tensors
from rlsys import fault_injection as faults


def tiny(tied: bool) -> nn.Module:
    config = Qwen2Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


def published_by(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(published_tensors(model, lambda parameter: parameter.detach()))


@pytest.mark.parametrize("tied", [True, False])
def test_every_name_of_the_state_dict_in_a_fixed_order(tied: bool) -> None:
    model = tiny(tied)
    published = published_by(model)
    names = [name for name, _ in published]
    # state_dict names a tied output layer too, unlike named_parameters.
    assert sorted(names) == sorted(model.state_dict())
    assert "lm_head.weight" in names
    assert names == [name for name, _ in published_by(tiny(tied))]
    for name, tensor in published:
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_tied_output_layer_is_sent_once_and_is_the_embedding() -> None:
    model = tiny(tied=True)
    published = dict(published_by(model))
    assert len(published) == len(published_by(model)) == len(list(model.named_parameters())) + 1
    assert torch.equal(published["lm_head.weight"], model.get_input_embeddings().weight)


def test_every_parameter_is_gathered_once_and_the_gathered_one_is_sent() -> None:
    # Gathering is collective under ZeRO 3: an extra call on one rank is a deadlock.
    model = tiny(tied=True)
    gathered: list[nn.Parameter] = []

    def gather(parameter: nn.Parameter) -> torch.Tensor:
        gathered.append(parameter)
        return torch.full_like(parameter.detach(), 7.0)

    published = dict(published_tensors(model, gather))
    assert [id(parameter) for parameter in gathered] == [id(parameter) for parameter in model.parameters()]
    assert all((tensor == 7).all() for tensor in published.values())


def test_the_fault_point_leaves_out_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tied=True)
    everything = {name for name, _ in published_by(model)}
    for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        monkeypatch.setattr(faults, "_faults", faults.parse(f"publish.omit:{name}"))
        assert everything - {left for left, _ in published_by(model)} == {name}
