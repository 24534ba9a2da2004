"""The ranking of right and wrong answers: loss, gradient and items, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from joint_samples import group, searched, trajectory

from learners.objective.joint import joint_loss, weigh_items
from learners.objective.ranking import ranking_loss
from learners.samples.batching import collate
from learners.samples.ranking import ranking_item
from rlsys.config.objective import ObjectiveConfig, PolicyConfig
from rlsys.types import TrajectoryGroup


def t64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_one_right_and_one_wrong_answer_by_hand():
    # log(1 + e^(-2 - -1)) = log(1 + e^-1) = 0.31326168751822286; d/ds_p = -e^-1 / (1 + e^-1) = -0.2689414213699951
    scores = t64(-1.0, -2.0).requires_grad_()
    output = ranking_loss(scores, torch.tensor([True, False]), torch.tensor([0, 0]), t64(1.0))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.31326168751822286, rel=1e-12)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-0.2689414213699951, 0.0], rel=1e-12)
    assert output.metrics["accuracy"].item() == 1


def test_two_prompts_by_hand():
    # Prompt 0: right -1 and -3, wrong -2. The sum is e^(-2+1) + e^(-2+3) = e^-1 + e = 3.0861612696304874, and the loss
    # is log(4.0861612696304874). d/ds_p: -e^-1 / 4.086... and -e / 4.086...; half of the pairs are in order.
    # Prompt 1: right -1, wrong -1 and -1: log(1 + 2) with gradient -2/3; no pair is in order.
    scores = t64(-1, -3, -2, -1, -1, -1).requires_grad_()
    is_right = torch.tensor([True, True, False, True, False, False])
    output = ranking_loss(scores, is_right, torch.tensor([0, 0, 0, 1, 1, 1]), t64(0.5, 0.25))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.5 * 1.4076059644443804 + 0.25 * math.log(3), rel=1e-12)
    assert scores.grad is not None
    total = 4.0861612696304874
    expected = [-0.5 * math.exp(-1) / total, -0.5 * math.e / total, 0, -0.25 * 2 / 3, 0, 0]
    assert scores.grad.tolist() == pytest.approx(expected, rel=1e-12)
    assert output.metrics["accuracy"].item() == 0.5


def test_scores_far_apart_stay_finite():
    scores = t64(-2000.0, 0.0).requires_grad_()
    output = ranking_loss(scores, torch.tensor([True, False]), torch.tensor([0, 0]), t64(1.0))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(2000, rel=1e-12)
    assert scores.grad is not None and scores.grad[0].item() == pytest.approx(-1, rel=1e-12)


RIGHT = trajectory([1, 2, 10, 11], [0, 0, 1, 1], 1.0)
WRONG = trajectory([1, 2, 12], [0, 0, 1], 0.0)
OTHER = trajectory([1, 2, 13], [0, 0, 1], 0.0)


def tokens(of: TrajectoryGroup, most: int = 8) -> list[list[int]] | None:
    item = ranking_item(of, most)
    return None if item is None else [sample.token_ids.tolist()[2:] for sample in item.samples]


def test_the_answers_of_a_group():
    assert tokens(group(WRONG, RIGHT, OTHER)) == [[10, 11], [12], [13]]
    assert tokens(group(WRONG, RIGHT, OTHER), most=1) == [[10, 11], [12]]
    assert tokens(group(WRONG, WRONG, RIGHT)) == [[10, 11], [12]]  # equal answers count once
    assert tokens(group(WRONG, OTHER)) is None and tokens(group(RIGHT, RIGHT)) is None
    failed = replace(OTHER, outcome="timeout")
    assert tokens(group(RIGHT, failed)) is None  # no verdict, no wrong answer


def test_a_chain_that_was_told_of_its_errors_is_no_answer():
    tree = searched(([1], "ok", 1.0), ([2], "wrong", 0.0))
    assert ranking_item(tree, 8) is not None
    right, wrong = tree.trajectories
    told = replace(right, steps=tuple(replace(step, backtrack=True) for step in right.steps))
    assert ranking_item(replace(tree, trajectories=(told, wrong)), 8) is None


def test_the_term_compares_means_of_tokens_and_divides_by_prompts():
    # The right answer has tokens of -1 and -3, mean -2; the wrong one -1. The loss of a prompt is log(1 + e^(-1 + 2)).
    items = [item for item in (ranking_item(group(RIGHT, WRONG), 8),) if item]
    weighted, denominators = weigh_items([*items, *items], PolicyConfig(), 10)
    assert denominators.ranking == denominators.by_term["ranking"] == 2
    batch = collate(weighted[:1], pad_id=0)
    assert batch.count("ranking") == 1
    logprobs = t64(-1, -3, -1)
    assert batch.target_ids.tolist() == [10, 11, 12]
    terms = joint_loss(logprobs, t64(), batch, ObjectiveConfig())
    assert set(terms) == {"ranking"}
    assert terms["ranking"].loss.item() == pytest.approx(math.log(1 + math.e) / 2, rel=1e-7)


def test_every_answer_is_scored_on_the_tokens_that_the_policy_chose():
    item = ranking_item(group(replace(RIGHT, loss_mask=np.array([False, False, False, True])), WRONG), 8)
    assert item is not None
    assert [sample.targets.tolist() for sample in item.samples] == [[False, False, False, True], [False, False, True]]
