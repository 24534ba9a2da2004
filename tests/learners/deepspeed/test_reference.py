"""The reference policy between its uses: the parameters are where they were, and a use holds copies on the device."""

from __future__ import annotations

import pytest
import torch
from plain_rank import build, plain_rank
from transformers import Qwen2ForCausalLM

from learners.deepspeed.reference import ReferencePolicy

GIVEN = {
    "input_ids": torch.arange(6)[None],
    "targets": torch.arange(5),
    "target_ids": torch.arange(1, 6),
    "temperature": torch.ones(5),
}


def test_a_use_holds_copies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(Qwen2ForCausalLM, 0)
    with torch.no_grad():
        expected = module(input_ids=GIVEN["input_ids"]).logits[0, :-1].log_softmax(-1)[range(5), range(1, 6)]
    reference = ReferencePolicy(module, plain_rank({}).settings)
    host = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    moved: list[str] = []

    def move(tensor: torch.Tensor, device: str, **_options: object) -> torch.Tensor:
        moved.append(device)
        return tensor.clone()  # another device

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", move)
            reference._device = "cuda"
            use = reference.in_use()
            use.__enter__()
        assert all(parameter.data_ptr() != host[name] for name, parameter in module.named_parameters())
        torch.testing.assert_close(reference(**GIVEN)[0], expected, rtol=1e-9, atol=1e-9)
        use.__exit__(None, None, None)
        assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == host
    assert moved == ["cuda"] * 2 * len(host)
    assert not any(parameter.requires_grad for parameter in module.parameters())
