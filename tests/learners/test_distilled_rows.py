"""The shares of own chains and of other rows in the term distill (GKD's lambda)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plain_rank import chain, distribution, plain_rank, sampled, with_teacher

from learners.objective.distillation import divergence_loss
from learners.objective.joint import weigh_items
from learners.samples.types import DistillTokens, PackItem, Sample
from rlsys.config.objective import PolicyConfig
from rlsys.types import Demonstration, StageName, TeacherTokens, TrainingBatch
from tests.helpers.joint_samples import ids

pytestmark = pytest.mark.usefixtures("process_group")

ROWS: dict[str, Any] = {
    "policy": {"weight": 0.0},
    "distill": {"weight": 1.0, "divergence": "top_k", "top_k": 3, "on_policy_share": 0.25},
    "sft": {"source": "demonstrations"},
}


def scored(row: Demonstration, seed: int = 0) -> Demonstration:
    rng, length = np.random.default_rng(seed), len(row.token_ids)
    teacher = TeacherTokens(
        mask=row.loss_mask,
        ids=np.stack([rng.permutation(64)[:3] for _ in range(length)]).astype(np.int32),
        logprobs=np.log(rng.dirichlet(np.ones(64), size=length)[:, :3]).astype(np.float32),
    )
    return Demonstration(token_ids=row.token_ids, loss_mask=row.loss_mask, teacher=teacher)


@pytest.mark.parametrize(("share", "own", "other"), [(1.0, 1 / 3, 0.0), (0.25, 1 / 12, 3 / 8), (0.0, 0.0, 1 / 2)])
def test_every_share_has_its_own_denominator(share: float, own: float, other: float) -> None:
    def sample(tokens: int, behavior: bool) -> PackItem:
        length = tokens + 1
        scores = np.zeros((length, 1))
        mask, ids_of = np.ones(length, bool), scores.astype(np.int32)
        teacher = TeacherTokens(mask=mask, ids=ids_of, logprobs=scores.astype(np.float32))
        figures = np.zeros(length, np.float32) if behavior else None
        distill = DistillTokens(mask=teacher.mask, teacher=teacher, behavior_logprobs=figures)
        return PackItem(samples=(Sample(token_ids=ids(*range(length)), distill=distill),))

    # Three tokens of own chains, two of a row; the first token of a sequence does not count.
    items = [sample(2, True), sample(1, True), sample(2, False)]
    weighed, denominators = weigh_items(items, PolicyConfig(), 12, share)
    found = [item.samples[0].distill.weight for item in weighed if item.samples[0].distill]
    assert found == pytest.approx([own, own, other], abs=1e-12)
    assert denominators.distill == 5


@pytest.mark.parametrize("stage", ["online", "sft", "warm_start"])
def test_a_step_over_chains_and_rows_is_the_weighted_sum_of_their_means(stage: StageName) -> None:
    groups = tuple(with_teacher(group, 3) for group in sampled(1)) if stage == "online" else ()
    rows = tuple(scored(chain(tokens, 1), seed) for seed, tokens in enumerate(([5, 6, 7], [5, 6, 7, 8, 9])))
    rank = plain_rank(ROWS, stage=stage)
    module = rank.policy.module

    def mean(sequences: Any) -> float:
        total, count = 0.0, 0
        for each in sequences:
            places = np.flatnonzero(each.teacher.mask)
            own = distribution(module, each.token_ids.tolist())[places - 1]
            found = own.gather(-1, torch.from_numpy(each.teacher.ids[places].astype(np.int64)))
            scores = torch.from_numpy(each.teacher.logprobs[places]).double()
            total += divergence_loss(found, scores, torch.ones(len(places)), beta=0.0).loss.item()
            count += len(places)
        return total / count

    expected = 0.75 * mean(rows)
    if groups:
        expected += 0.25 * mean(each for group in groups for each in group.trajectories)
    metrics = rank.train(TrainingBatch(groups=groups, demonstrations=rows), 0, 1)
    assert metrics["objective/distill_loss"] == pytest.approx(expected, rel=1e-6)
    assert ("objective/sft_loss" in metrics) == (stage != "online")


def test_own_chains_are_not_trained_where_the_whole_term_is_over_rows() -> None:
    rank = plain_rank({**ROWS, "distill": {**ROWS["distill"], "on_policy_share": 0.0}})
    groups, rows = tuple(with_teacher(group, 3) for group in sampled(1)), (scored(chain([5, 6, 7], 1)),)
    metrics = rank.train(TrainingBatch(groups=groups, demonstrations=rows), 0, 1)
    assert metrics["objective/distill_denominator"] == 2


def test_a_row_without_scores_is_an_error() -> None:
    rank = plain_rank(ROWS, stage="sft")
    with pytest.raises(ValueError, match="expected a row with the scores of a teacher, found none"):
        rank.train(TrainingBatch(demonstrations=(chain([5, 6, 7], 1),)), 0, 1)
