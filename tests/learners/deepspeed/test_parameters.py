"""Parameters on their way out: every name, the tied output layer too, in buckets of the wanted size."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from learners.deepspeed.parameters import full_parameters, pack
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


def exported(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(full_parameters(model, lambda parameter: parameter.detach()))


@pytest.mark.parametrize("tied", [True, False])
def test_every_name_of_the_state_dict_in_a_fixed_order(tied: bool) -> None:
    model = tiny(tied)
    found = exported(model)
    names = [name for name, _ in found]
    # state_dict names a tied output layer too, unlike named_parameters.
    assert sorted(names) == sorted(model.state_dict())
    assert "lm_head.weight" in names
    assert names == [name for name, _ in exported(tiny(tied))]
    for name, tensor in found:
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_tied_output_layer_is_sent_once_and_is_the_embedding() -> None:
    model = tiny(tied=True)
    found = dict(exported(model))
    assert len(found) == len(exported(model)) == len(list(model.named_parameters())) + 1
    assert torch.equal(found["lm_head.weight"], model.get_input_embeddings().weight)


def test_every_parameter_is_gathered_once_and_the_gathered_one_is_sent() -> None:
    # Gathering is collective under ZeRO 3: one time more on one rank is a deadlock.
    model = tiny(tied=True)
    gathered: list[nn.Parameter] = []

    def gather(parameter: nn.Parameter) -> torch.Tensor:
        gathered.append(parameter)
        return torch.full_like(parameter.detach(), 7.0)

    found = dict(full_parameters(model, gather))
    assert [id(parameter) for parameter in gathered] == [id(parameter) for parameter in model.parameters()]
    assert all((tensor == 7).all() for tensor in found.values())


def test_the_fault_point_leaves_out_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tied=True)
    everything = {name for name, _ in exported(model)}
    for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        monkeypatch.setattr(faults, "_faults", faults.parse(f"publish.omit:{name}"))
        assert everything - {found for found, _ in exported(model)} == {name}


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 40), max_size=12), bucket_bytes=st.integers(1, 200))
def test_buckets_close_at_the_first_tensor_that_fills_them(sizes: list[int], bucket_bytes: int) -> None:
    tensors = [(f"t{i}", torch.full((size,), float(i))) for i, size in enumerate(sizes)]
    packed = list(pack(iter(tensors), bucket_bytes))
    assert [spec.name for bucket, _ in packed for spec in bucket.tensors] == [name for name, _ in tensors]
    assert b"".join(data.tobytes() for _, data in packed) == b"".join(t.numpy().tobytes() for _, t in tensors)
    for number, (bucket, data) in enumerate(packed):
        assert bucket.bytes == data.nbytes == sum(spec.bytes for spec in bucket.tensors)
        assert bucket.sha256 == hashlib.sha256(data.tobytes()).hexdigest()
        assert bucket.bytes - bucket.tensors[-1].bytes < bucket_bytes  # it was open when the last one came
        assert bucket.bytes >= bucket_bytes or number == len(packed) - 1


@pytest.mark.parametrize(("dtype", "name", "width"), [(torch.float32, "float32", 4), (torch.bfloat16, "bfloat16", 2)])
def test_a_bucket_describes_shape_and_dtype(dtype: torch.dtype, name: str, width: int) -> None:
    # A transposed tensor is not contiguous; its bytes are sent in the order of its shape.
    tensor = torch.arange(6, dtype=dtype).reshape(2, 3).T
    ((bucket, data),) = pack(iter([("w", tensor), ("scalar", torch.tensor(5.0, dtype=dtype))]), 10**6)
    assert [(spec.name, spec.shape, spec.dtype) for spec in bucket.tensors] == [
        ("w", (3, 2), name),
        ("scalar", (), name),
    ]
    assert data.dtype == np.uint8
    assert data.shape == (7 * width,)
    values = torch.from_numpy(data).view(dtype)
    assert values.tolist() == [0, 3, 1, 4, 2, 5, 5]
