"""Training steps of the term distill, alone and beside others, against plain torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from plain_rank import RATE, distribution, plain_rank, sampled, tree, with_teacher
from torch import Tensor, nn

from learners.objective.distillation import divergence_loss
from rlsys.types import TrainingBatch, TrajectoryGroup

pytestmark = pytest.mark.usefixtures("process_group")

ALONE: dict[str, Any] = {
    "policy": {"weight": 0.0},
    "distill": {"weight": 0.5, "divergence": "top_k", "top_k": 3, "beta": 0.5},
}


def expected_loss(module: nn.Module, groups: tuple[TrajectoryGroup, ...]) -> Tensor:
    """Return the mean divergence over all tokens that the teacher scored, at temperature 1."""
    losses, count = [], 0
    for each in (trajectory for group in groups for trajectory in group.trajectories):
        teacher = each.teacher
        assert teacher is not None
        places = np.flatnonzero(teacher.mask)
        own = distribution(module, each.token_ids.tolist())[places - 1]
        found = own.gather(-1, torch.from_numpy(teacher.ids[places].astype(np.int64)))
        scores = torch.from_numpy(teacher.logprobs[places]).double()
        losses.append(divergence_loss(found, scores, torch.ones(len(places)), beta=0.5).loss)
        count += len(places)
    return torch.stack(losses).sum() / count


def test_a_step_of_distillation_alone_goes_down_the_gradient_of_its_loss() -> None:
    groups = tuple(with_teacher(group, 3) for group in sampled(2))
    rank = plain_rank(ALONE)
    module = copy.deepcopy(rank.policy.module)
    metrics = rank.train(TrainingBatch(groups=groups), 0, 1)
    loss = expected_loss(module, groups)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter -= RATE * 0.5 * gradient
    expected = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    assert metrics["objective/distill_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["distill/divergence"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["learner/left_out_share"] == 0
    torch.testing.assert_close(rank.policy.vector(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("group", [sampled(1)[0], tree()], ids=["sampled", "searched"])
def test_sampled_tokens_move_towards_a_teacher_that_prefers_them(group: TrajectoryGroup) -> None:
    objective = {"policy": {"weight": 1.0, "estimator": "dr_grpo"}, "distill": {"weight": 1.0}}
    metrics = plain_rank(objective).train(TrainingBatch(groups=(with_teacher(group, 1),)), 0, 1)
    assert metrics["objective/distill_denominator"] > 0
    assert metrics["objective/distill_loss"] != 0 and metrics["distill/divergence"] != 0


def test_a_group_of_equal_rewards_is_trained_by_its_teacher_alone() -> None:
    group = with_teacher(sampled(1)[0], 1)
    equal = TrajectoryGroup(prompt=group.prompt, trajectories=group.trajectories[::2])  # rewards 0
    objective = {"policy": {"weight": 1.0}, "distill": {"weight": 1.0}}
    rank = plain_rank(objective)
    before = rank.policy.vector().clone()
    metrics = rank.train(TrainingBatch(groups=(equal,)), 0, 1)
    assert metrics["objective/policy_loss"] == 0 and metrics["learner/left_out_share"] == 0
    assert not torch.equal(rank.policy.vector(), before)


def test_a_step_without_the_term_ignores_the_teacher() -> None:
    plain, scored = sampled(2), tuple(with_teacher(group, 1) for group in sampled(2))
    vectors = []
    for groups in (tuple(plain), scored):
        rank = plain_rank({"policy": {"estimator": "dr_grpo"}})
        rank.train(TrainingBatch(groups=groups), 0, 1)
        vectors.append(rank.policy.vector())
    assert torch.equal(*vectors)


def test_the_share_of_the_teacher_in_a_batch_replaces_that_of_the_config() -> None:
    groups = tuple(with_teacher(group, 3) for group in sampled(2))
    vectors, shares = [], []
    for first, in_batch in ((0.3, None), (0.9, 0.3), (0.9, None)):
        rank = plain_rank({**ALONE, "distill": {**ALONE["distill"], "interpolation": first}})
        metrics = rank.train(TrainingBatch(groups=groups, interpolation=in_batch), 0, 1)
        vectors.append(rank.policy.vector())
        shares.append(metrics["distill/interpolation"])
    assert shares == [0.3, 0.3, 0.9]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[1], vectors[2])
