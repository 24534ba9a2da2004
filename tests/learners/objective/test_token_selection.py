"""Recalibrated teachers, the gate of confidence and the entropy of uncertain tokens, against numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learners.objective.distillation import divergence_loss
from learners.objective.token_selection import confidence_gate, recalibrated, uncertain_entropy
from learners.samples.types import DistillTokens, PackItem, Sample
from rlsys.config.objective import ObjectiveConfig
from rlsys.types import TeacherTokens
from tests.helpers.joint_samples import one_by_one, planned, sft_sample, update


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def binary_entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


# --- FIRST ---


def test_a_temperature_of_2_takes_square_roots_and_keeps_the_probability_of_all() -> None:
    found = recalibrated(logs([0.64, 0.16]), 2.0).exp()  # square roots 0.8 and 0.4, of 0.8 together
    torch.testing.assert_close(found, torch.tensor([[0.8 * 2 / 3, 0.8 / 3]], dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_temperature_of_1_changes_nothing_and_small_ones_leave_the_first_token() -> None:
    teacher = logs([0.5, 0.3, 0.1], [0.9, 0.05, 0.01])
    torch.testing.assert_close(recalibrated(teacher, 1.0), teacher, rtol=0, atol=1e-12)
    assert recalibrated(teacher, 0.01).exp()[:, 0].tolist() == pytest.approx([0.9, 0.96], abs=1e-12)


# --- TSD-KD ---


def test_the_gate_compares_entropies() -> None:
    # One token and the rest. Policy: certain, as uncertain as possible, in between; teacher: (1/4, 3/4).
    policy, teacher = logs([0.999], [0.5], [0.75]), logs([0.25], [0.25], [0.25])
    gaps = [binary_entropy(p) - binary_entropy(0.25) for p in (0.999, 0.5, 0.75)]
    found = confidence_gate(policy.requires_grad_(), teacher)
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-gap)) for gap in gaps], abs=1e-12)
    assert found[0] < 0.5 < found[1] and found[2].item() == pytest.approx(0.5)
    assert not found.requires_grad


def test_the_most_uncertain_tokens_of_each_chain_by_hand() -> None:
    # Chains of 3 and of 2 tokens; half of each, rounded up: 2 and 1.
    probabilities = [0.5, 0.9, 0.7, 0.99, 0.95]
    policy = logs(*[[p] for p in probabilities]).requires_grad_()
    weights, rows = torch.full((5,), 1 / 5, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1])
    loss = uncertain_entropy(policy, weights, rows, share=0.5)
    scales = {0.5: 3 / 2, 0.7: 3 / 2, 0.95: 2}  # tokens of the chain / chosen ones
    expected = sum(binary_entropy(p) * scale for p, scale in scales.items()) / 5
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    # d H / d log p = -p (log p - log(1 - p)); tokens that are not chosen have none.
    gradient = [-p * math.log(p / (1 - p)) / 5 * scales.get(p, 0.0) for p in probabilities]
    assert policy.grad is not None and policy.grad[:, 0].tolist() == pytest.approx(gradient, abs=1e-12)


def test_equal_entropies_choose_the_first_tokens_and_a_share_of_a_tenth_is_exact() -> None:
    policy = logs(*[[0.6]] * 30).requires_grad_()
    uncertain_entropy(policy, torch.ones(30), torch.zeros(30, dtype=torch.int64), share=0.1).backward()
    assert policy.grad is not None and policy.grad[:, 0].nonzero().squeeze(-1).tolist() == [0, 1, 2]


# --- in the joint loss ---


def scored(tokens: list[int], seed: int, k: int = 3) -> Sample:
    """Return a row of which a teacher has scored all tokens but the first."""
    rng, length = np.random.default_rng(seed), len(tokens)
    teacher = TeacherTokens(
        mask=np.arange(length) > 0,
        ids=np.stack([rng.permutation(11)[:k] for _ in range(length)]).astype(np.int32),
        logprobs=np.log(rng.dirichlet(np.ones(11), size=length)[:, :k]).astype(np.float32),
    )
    row = sft_sample(tokens, [0] * length)
    return Sample(token_ids=row.token_ids, distill=DistillTokens(mask=teacher.mask, teacher=teacher))


def distilled(items: list[PackItem], plan: Any, **settings: Any) -> tuple[float, Tensor]:
    objective = ObjectiveConfig.model_validate(
        {"distill": {"weight": 1.0, "divergence": "top_k", "on_policy_share": 0.0, **settings}}
    )
    losses, gradient = update(items, objective, weights={"distill": 1.0}, plan=plan)
    return losses["distill"], gradient


SETTINGS: dict[str, dict[str, Any]] = {
    "FIRST": {"teacher_temperature": 1.7},
    "TSD-KD": {"beta": 0.9, "confidence_gate": True, "entropy_coef": 0.5, "entropy_share": 0.4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_and_micro_batches_change_nothing(name: str) -> None:
    rows = ([1, 2, 3, 4, 5], [2, 4, 6], [6, 5, 4, 3], [7, 1])
    items = [PackItem(samples=(scored(row, number),)) for number, row in enumerate(rows)]
    plain, settings = distilled(items, one_by_one(items)), SETTINGS[name]
    whole = distilled(items, planned(items, 1, 1000), **settings)
    assert abs(whole[0] - plain[0]) > 1e-3
    for plan in (one_by_one(items), planned(items, 2, 6), planned(items, 3, 5)):
        loss, gradient = distilled(items, plan, **settings)
        assert loss == pytest.approx(whole[0], abs=1e-7)
        torch.testing.assert_close(gradient, whole[1], rtol=0, atol=1e-7)


def test_the_joint_loss_is_the_gated_divergence_plus_the_entropy() -> None:
    item = PackItem(samples=(scored([1, 2, 3, 4, 5], 0),))
    settings = SETTINGS["TSD-KD"]
    both, _ = distilled([item], None, **settings)
    divergence, _ = distilled([item], None, **{**settings, "entropy_coef": 0.0})
    twice, _ = distilled([item], None, **{**settings, "entropy_coef": 1.0})
    assert twice - divergence == pytest.approx(2 * (both - divergence), abs=1e-9) and both > divergence


def test_no_gradient_where_policy_and_teacher_agree_with_a_gate() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p = logits.log_softmax(-1)
    values, ids = p.detach().topk(3)
    own = p.gather(-1, ids)
    loss = divergence_loss(own, values, confidence_gate(own, values), beta=0.9).loss
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12
