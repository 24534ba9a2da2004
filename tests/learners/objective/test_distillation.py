"""Distillation against numbers by hand, against whole distributions, and by its gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learners.objective.distillation import divergence_loss, sampled_loss
from learners.objective.logprobs import OtherTokens, token_logprobs
from learners.samples.types import DistillTokens, PackItem, Sample, count_targets
from rlsys.config.objective import DistillConfig, ObjectiveConfig
from rlsys.types import TeacherTokens
from tests.helpers.joint_samples import one_by_one, planned, policy_sample, sft_sample, update

VOCABULARY = 7
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def value(policy: Tensor, teacher: Tensor, beta: float) -> float:
    return divergence_loss(policy, teacher, torch.ones(len(policy)), beta=beta).loss.item()


def distributions(seed: int = 0, rows: int = 5) -> tuple[Tensor, Tensor]:
    """Return logits of a policy, with gradient, and log-probabilities of a teacher, [rows, vocabulary]."""
    generator = torch.Generator().manual_seed(seed)
    policy, teacher = 2 * torch.randn(2, rows, VOCABULARY, dtype=torch.float64, generator=generator)
    return policy.requires_grad_(), teacher.log_softmax(-1)


def whole_divergence(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Return the sum over rows of the generalised divergence of whole distributions, [N, V] log-probabilities."""

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first.exp() * (first - second)).sum()

    if beta in (0, 1):
        return kl(q, p) if beta == 0 else kl(p, q)
    mixture = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = teacher.topk(k, dim=-1)
    return values, ids


def test_numbers_by_hand() -> None:
    # One token of three is given: teacher (1/2, rest 1/2), policy (1/4, rest 3/4).
    policy, teacher = logs(0.25), logs(0.5)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert value(policy, teacher, 0.0) == pytest.approx(forward, abs=1e-12)
    assert value(policy, teacher, 1.0) == pytest.approx(reverse, abs=1e-12)
    # The mixture is (3/8, 5/8).
    to_mixture = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5), 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    assert value(policy, teacher, 0.5) == pytest.approx(0.5 * sum(to_mixture), abs=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_give_the_divergence_of_whole_distributions(beta: float) -> None:
    logits, teacher = distributions()
    p = logits.log_softmax(-1)
    expected = whole_divergence(p, teacher, beta)
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
    found = divergence_loss(p, teacher, torch.ones(len(p)), beta=beta)
    (ours,) = torch.autograd.grad(found.loss, logits)
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert found.metrics["divergence"].item() == pytest.approx(expected.item(), abs=1e-10)
    torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_more_tokens_see_more_and_never_more_than_there_is(beta: float) -> None:
    for seed in range(20):
        logits, teacher = distributions(seed)
        p = logits.detach().log_softmax(-1)
        found = []
        for k in range(1, VOCABULARY + 1):
            values, ids = top(teacher, k)
            found.append(value(p.gather(-1, ids), values, beta))
        assert all(more >= fewer - 1e-10 for fewer, more in itertools.pairwise(found))
        assert found[-1] <= whole_divergence(p, teacher, beta).item() + 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_there_is_no_gradient_where_policy_and_teacher_agree(beta: float) -> None:
    logits, _ = distributions()
    p = logits.log_softmax(-1)
    for k in (1, 3, VOCABULARY):
        values, ids = top(p.detach(), k)
        loss = divergence_loss(p.gather(-1, ids), values, torch.ones(len(p)), beta=beta).loss
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert gradient.abs().max() < 1e-12


def test_a_token_that_the_teacher_excludes_leaves_the_loss_finite() -> None:
    policy = logs(0.3, 0.3).requires_grad_()
    loss = divergence_loss(policy, torch.tensor([[math.log(0.9), -math.inf]]), torch.ones(1), beta=1.0).loss
    loss.backward()
    assert loss.isfinite() and policy.grad is not None and policy.grad.isfinite().all()


def test_an_interpolated_teacher_has_the_gradient_of_its_cross_entropy() -> None:
    logits, teacher = distributions()
    share = 0.4
    mixed = ((1 - share) * logits.detach() + share * teacher).softmax(-1)
    p = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(mixed * p).sum(), logits, retain_graph=True)
    loss = divergence_loss(p, teacher, torch.ones(len(p)), beta=0.0, interpolation=share).loss
    (ours,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx((mixed * (mixed.log() - p.detach())).sum().item(), abs=1e-10)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_the_share_of_the_teacher_grows_linearly_to_that_of_the_last_step() -> None:
    distill = DistillConfig(divergence="top_k", interpolation=0.4, final_interpolation=1.0)
    assert [distill.interpolation_at(step, 4) for step in range(4)] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert DistillConfig().interpolation_at(3, 4) == 1.0


def test_the_teacher_in_the_ratio_is_an_old_policy_between_both() -> None:
    tokens, mask, advantages = [1, 2, 3, 4], [0, 1, 1, 1], [0, 1, -1, 2]
    old, teacher = (np.log(np.array(row, dtype=np.float32)) for row in ([1, 0.2, 0.5, 0.3], [1, 0.6, 0.1, 0.2]))
    share = 0.25

    def run(old_logprobs: np.ndarray, settings: dict[str, float], **changes: np.ndarray) -> Any:
        sample = policy_sample(tokens, mask, advantages, old_logprobs=old_logprobs, **changes)
        objective = ObjectiveConfig.model_validate({"policy": {"importance_cap": None, **settings}})
        return update([PackItem(samples=(sample,))], objective, weights={"policy": 1.0})

    anchored = run(old, {"teacher_share": share}, teacher_logprobs=teacher)
    expected = run((1 - share) * old + share * teacher, {})
    assert anchored[0] == pytest.approx(expected[0], abs=1e-7)
    torch.testing.assert_close(anchored[1], expected[1], rtol=0, atol=1e-7)
    without = run(old, {}, teacher_logprobs=teacher), run(old, {})
    assert without[0][0] == without[1][0]


def test_a_beta_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.distill.beta in \[0, 1\], found 2"):
        value(logs(0.5), logs(0.5), 2.0)


def test_the_expected_gradient_of_sampled_tokens_is_that_of_the_reverse_divergence() -> None:
    logits, teacher = distributions()
    p = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(whole_divergence(p, teacher, 1.0), logits, retain_graph=True)
    total = torch.zeros_like(logits)
    for token in range(VOCABULARY):
        own = p[:, token]
        behavior = own.detach()
        loss = sampled_loss(own, behavior, teacher[:, token], behavior.exp(), clip_low=0.2, clip_high=0.2).loss
        total += torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_the_sampled_estimate_by_hand() -> None:
    own = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    output = sampled_loss(own, own.detach(), logs(0.25)[0], torch.tensor([2.0]), clip_low=0.2, clip_high=0.2)
    output.loss.backward()
    assert output.metrics["divergence"].item() == pytest.approx(math.log(2))
    assert own.grad is not None and own.grad.item() == pytest.approx(2 * math.log(2))


def test_other_tokens_have_the_log_probabilities_and_gradients_of_torch() -> None:
    logits, _ = distributions(rows=4)
    rows, ids = torch.tensor([3, 1]), torch.tensor([[0, 5, 5], [2, 6, 1]])
    scales = torch.arange(6, dtype=torch.float64).view(2, 3) - 2
    targets, ones = torch.tensor([1, 2, 3, 4]), torch.ones(4)
    own, _, others, _ = token_logprobs(logits, targets, ones, others=OtherTokens(rows, ids))
    (ours,) = torch.autograd.grad(own.sum() + (others * scales).sum(), logits)
    plain = logits.log_softmax(-1)
    expected = plain[rows.unsqueeze(-1), ids]
    loss = plain.gather(-1, targets.unsqueeze(-1)).sum() + (expected * scales).sum()
    torch.testing.assert_close(others, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, torch.autograd.grad(loss, logits)[0], rtol=0, atol=1e-12)


def distilled(sample: Sample, places: Sequence[int], k: int, seed: int) -> Sample:
    """Return a sample some of whose tokens a teacher has scored."""
    generator = np.random.default_rng(seed)
    length = len(sample.token_ids)
    mask = np.isin(np.arange(length), places)
    ids = np.stack([generator.permutation(VOCABULARY)[:k] for _ in range(length)]).astype(np.int32)
    logprobs = np.log(generator.dirichlet(np.ones(VOCABULARY), size=length)[:, :k]).astype(np.float32)
    behavior = np.log(generator.uniform(0.1, 0.9, size=length)).astype(np.float32)
    teacher = TeacherTokens(mask=mask, ids=ids, logprobs=logprobs)
    tokens = DistillTokens(mask=mask, teacher=teacher, behavior_logprobs=behavior)
    return Sample(token_ids=sample.token_ids, policy=sample.policy, sft_mask=sample.sft_mask, distill=tokens)


@pytest.mark.parametrize("divergence", ["top_k", "sampled"])
def test_ranks_and_micro_batches_change_nothing(divergence: str) -> None:
    k = 3 if divergence == "top_k" else 1
    samples = [
        distilled(policy_sample([1, 2, 3, 4, 5], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]), [2, 3, 4], k, 1),
        distilled(sft_sample([2, 4, 6], [0, 1, 1]), [1], k, 2),
        policy_sample([3, 1, 2], [0, 1, 1], [0, -1, -1]),
        distilled(policy_sample([6, 5, 4, 3], [0, 1, 1, 1], [0, 2, 2, 2]), [0, 1, 3], k, 3),
    ]
    items = [PackItem(samples=(sample,)) for sample in samples]
    objective = ObjectiveConfig.model_validate({"distill": {"weight": 0.8, "divergence": divergence}})
    weights = {"policy": 1.0, "sft": 0.5, "distill": 0.8}
    whole = update(items, objective, weights=weights, plan=planned(items, 1, 1000))
    assert whole[0]["distill"] != 0 and sum(count_targets(sample.distill_mask) for sample in samples) == 6
    for plan in (one_by_one(items), planned(items, 2, 6), planned(items, 3, 5)):
        losses, gradient = update(items, objective, weights=weights, plan=plan)
        assert losses == pytest.approx(whole[0], abs=1e-7)
        torch.testing.assert_close(gradient, whole[1], rtol=0, atol=1e-7)
