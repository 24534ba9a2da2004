"""Our divergence from a teacher equals that of TRL's GKD trainer, value and gradient, in double precision."""

from __future__ import annotations

import importlib
from unittest.mock import patch

import pytest
import torch

from learners.objective.distillation import divergence_loss

VOCABULARY, ROWS = 37, 11
TOLERANCE = 1e-10


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1.0, 4.0])  # at 4 some tokens have less than 1e-10
def test_all_tokens_of_a_teacher(beta, scale):
    # TRL would also load vLLM where that is installed: seconds, for nothing that a loss needs.
    imports = importlib.import_module("trl.import_utils")
    with patch.object(imports, "is_vllm_available", lambda *_, **__: False):
        trainer = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    generator = torch.Generator().manual_seed(int(10 * beta))
    policy, teacher = scale * torch.randn(2, ROWS, VOCABULARY, dtype=torch.float64, generator=generator)
    policy.requires_grad_()
    labels = torch.where(torch.arange(ROWS) % 4 == 3, -100, 1)  # one row in four trains nothing
    theirs = trainer.generalized_jsd_loss(policy[None], teacher[None], labels=labels[None], beta=beta)
    trained = labels != -100
    weights = trained.double() / trained.sum()
    # The teacher names its tokens in an order of its own.
    values, ids = teacher.log_softmax(-1).sort(descending=True)
    ours = divergence_loss(policy.log_softmax(-1).gather(-1, ids), values, weights, beta=beta).loss
    gradients = [torch.autograd.grad(loss, policy)[0] for loss in (ours, theirs)]
    assert theirs.item() > 0.05
    assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE, rel=0)
    torch.testing.assert_close(*gradients, rtol=0, atol=TOLERANCE)
