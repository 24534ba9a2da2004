"""Whole training steps on one rank, with plain torch in place of DeepSpeed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from joint_samples import ids, random_preferences
from plain_rank import (
    EVERY_TERM,
    NOTHING_SCORED,
    chain,
    everything,
    plain_rank,
    sampled,
    tree,
)
from torch import Tensor

from learners import rank as rank_module
from learners.deepspeed.reference import ReferencePolicy
from learners.deepspeed.tensor_files import read_tensors, write_tensors
from learners.objective.schedule import learning_rate
from rlsys.config.files import parse_config
from rlsys.config.schema import OptimizerConfig
from rlsys.config.stages import TERMS, stage_plan
from rlsys.errors import ConfigError, LearnerLostError, NonFiniteLossError
from rlsys.run.metrics import METRICS
from rlsys.transfer.object_store import ObjectStoreSender
from rlsys.transfer.shelf import BucketRequest
from rlsys.types import StageName, StepPreference, TrainingBatch

pytestmark = pytest.mark.usefixtures("process_group")


def test_all_metrics_are_registered_and_finite() -> None:
    metrics = plain_rank(EVERY_TERM, updates=2).train(everything(), 0, 1)
    assert set(metrics) <= set(METRICS)
    assert all(math.isfinite(value) for value in metrics.values())
    for term in TERMS:
        names = ["loss", "weight", "denominator", "share", "grad_norm"] + ["grad_share"] * (term != "value")
        assert {f"objective/{term}_{name}" for name in names} <= set(metrics)
    assert sum(metrics[f"objective/{term}_share"] for term in TERMS) == pytest.approx(1, rel=1e-12)
    assert metrics["objective/value_weight"] == 0.5
    assert metrics["learner/updates"] == 2
    assert metrics["learner/empty_terms"] == 0
    assert metrics["learner/ratio_max"] > 1  # the second update no longer starts from the old policy


@pytest.mark.parametrize(("objective", "updates", "rtol"), [(EVERY_TERM, 2, 1e-6), (NOTHING_SCORED, 1, 1e-12)])
def test_micro_batches_change_nothing_but_the_padding(objective: dict[str, Any], updates: int, rtol: float) -> None:
    def run(budget: int) -> tuple[dict[str, float], list[Tensor]]:
        rank = plain_rank(objective, updates=updates, budget=budget)
        metrics = rank.train(everything(), 0, 1)
        return metrics, [model.vector() for model in (rank.policy, rank.critic) if model is not None]

    expected, vectors = run(9999)
    metrics, small_batch_vectors = run(16)
    assert metrics.pop("learner/padding_share") < expected.pop("learner/padding_share")
    assert metrics == pytest.approx(expected, rel=1e-6)  # norms of terms, and values, are summed in fp32
    for vector, expected_vector in zip(small_batch_vectors, vectors, strict=True):
        torch.testing.assert_close(vector, expected_vector, rtol=rtol, atol=rtol / 1000)


@pytest.mark.parametrize(
    ("batch", "stage", "terms"),
    [
        (TrainingBatch(demonstrations=(chain([5, 6, 7], 1),)), "sft", {"sft"}),
        (TrainingBatch(demonstrations=(chain([5, 6, 7], 1),)), "warm_start", {"sft"}),
        (TrainingBatch(pairs=tuple(random_preferences(3))), "preference", {"preference", "sft"}),
        (TrainingBatch(groups=tuple(sampled(2))), "online", {"policy", "kl"}),
        (TrainingBatch(groups=(tree(), tree())), "online", {"policy", "kl", "preference", "sft"}),
        (TrainingBatch(), "online", set()),
    ],
)
def test_a_step_with_one_kind_of_data(batch: TrainingBatch, stage: StageName, terms: set[str]) -> None:
    # Terms without data add no loss, and their denominator is 0.
    unused: dict[str, Any] = {term: {} for term in ("policy", "value", "distill", "ranking", "custom")}
    rank = plain_rank({**EVERY_TERM, **unused}, stage=stage)
    if stage != "online":
        rank.reference = None  # pairs of files are scored before the stage
    before = rank.policy.vector()
    metrics = rank.train(batch, 0, 1)
    assert torch.equal(rank.policy.vector(), before) == (not terms)
    for term in ("policy", "kl", "preference", "sft"):
        assert bool(metrics.get(f"objective/{term}_denominator", 0)) == (term in terms)
        assert bool(metrics.get(f"objective/{term}_loss", 0)) == (term in terms)
    empty = {"online": 4, "preference": 2}.get(stage, 1) - len(terms)
    assert (metrics["learner/empty_terms"], metrics["learner/updates"]) == (empty, float(bool(terms)))


def test_more_updates_than_groups() -> None:
    rank = plain_rank({"policy": {"estimator": "dr_grpo"}}, updates=4)
    metrics = rank.train(TrainingBatch(groups=tuple(sampled(2))), 0, 1)
    assert (metrics["learner/updates"], rank.policy.updates) == (2.0, 2)
    tokens = sum(each.completion_length for group in sampled(2) for each in group.trajectories)
    assert metrics["objective/policy_denominator"] == tokens / 4  # the mean over the updates, empty ones too
    assert metrics["learner/empty_terms"] == 0.5


def test_a_term_may_fade_in_or_out() -> None:
    for kl in ({"weight": 0.1, "final_weight": 0.0}, {"weight": 0.0, "final_weight": 0.1}):
        rank = plain_rank({"kl": kl}, steps=3)
        weights = []
        for step in range(3):
            metrics = rank.train(TrainingBatch(groups=tuple(sampled(2))), step, step + 1)
            weights.append(metrics.get("objective/kl_weight", 0.0))
            assert ("learner/kl" in metrics) == bool(weights[-1])
        assert sorted(weights) == [0.0, 0.05, 0.1]


def test_the_learning_rates_of_policy_and_critic_reach_their_ends_with_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 5 steps of 3 updates; 2 steps update only the critic: 9 updates of the policy and 15 of the critic. At its last
    # update each rate has fallen to a tenth.
    optimizer = {"warmup_updates": 0, "schedule": "linear", "final_fraction": 0.1}
    values = {
        "model": {"path": "unused"},
        "task": {"type": "letter_count"},
        "train": {
            "max_steps": 5,
            "updates_per_step": 3,
            "groups_per_step": 3,
            "optimizer": {**optimizer, "learning_rate": 0.5},
            "critic_optimizer": {**optimizer, "learning_rate": 0.25},
        },
        "objective": {"policy": {"estimator": "gae"}, "value": {"weight": 0.5, "warmup_steps": 2}},
        "run": {"dir": "unused"},
        "stages": ["online"],
    }
    built: dict[str, tuple[OptimizerConfig, int]] = {}

    def build(name: str, *arguments: Any) -> SimpleNamespace:
        built[name] = arguments[-2:]
        return SimpleNamespace(destroy=lambda: None)

    monkeypatch.setattr(rank_module, "TrainedModel", build)
    for name in ("load_policy", "load_critic", "policy_config", "restore_model"):
        loaded = SimpleNamespace(config=None)
        monkeypatch.setattr(rank_module, name, lambda *arguments, loaded=loaded, **options: loaded)
    rank = plain_rank({})
    rank._release = lambda: None
    rank.forward.describe = lambda *_models: None
    rank.start_stage(stage_plan(parse_config(values, "test"), "online").settings, Path("unused"), None, None)
    assert {name: total for name, (_, total) in built.items()} == {"policy": 9, "critic": 15}
    last = {name: learning_rate(config, total - 1, total) for name, (config, total) in built.items()}
    assert last == {"policy": pytest.approx(0.05, rel=1e-12), "critic": pytest.approx(0.025, rel=1e-12)}
    # The policy is updated only in the last three steps.
    stage, rank = rank.stage, plain_rank(values["objective"])
    rank.stage = stage
    for step in range(5):
        rank.train(TrainingBatch(groups=tuple(sampled(3))), step, step + 1)
    assert (rank.policy.updates, rank.critic.updates) == (9, 15)


def test_a_critic_that_is_not_finite_ends_the_step_before_an_update() -> None:
    rank = plain_rank(EVERY_TERM)
    before = rank.policy.vector()
    with torch.no_grad():
        rank.critic.module.score.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="^values of the critic: "):
        rank.train(everything(), 0, 1)
    assert torch.equal(rank.policy.vector(), before) and rank.policy.updates == rank.critic.updates == 0


def test_a_later_update_that_is_not_finite_rolls_back_the_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, untouched = plain_rank(EVERY_TERM, updates=2), plain_rank(EVERY_TERM, updates=2)
    models = [rank.policy, rank.critic]
    before = [model.vector() for model in models]
    seen: list[Tensor] = []

    def refuse_the_second() -> None:
        seen.append(rank.policy.vector())
        if len(seen) == 2:
            raise NonFiniteLossError("gradient of the policy is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(rank.policy, "check_finite", refuse_the_second)
        with pytest.raises(NonFiniteLossError, match="gradient of the policy is not finite"):
            rank.train(everything(), 0, 1)
    assert not torch.equal(*seen)  # the first update was made
    assert [model.updates for model in models] == [0, 0]
    assert all(torch.equal(model.vector(), vector) for model, vector in zip(models, before, strict=True))
    assert rank.train(everything(), 0, 1) == untouched.train(everything(), 0, 1)
    for model, other in zip(models, (untouched.policy, untouched.critic), strict=True):
        assert torch.equal(model.vector(), other.vector())


WARM_UP = {
    "policy": EVERY_TERM["policy"],
    "kl": EVERY_TERM["kl"],
    "value": {"weight": 0.5, "warmup_steps": 1},
}


@pytest.mark.parametrize(
    ("objective", "step", "updates", "copied"),
    [
        ({}, 0, 1, set()),
        ({}, 0, 2, {"policy"}),
        (EVERY_TERM, 0, 1, {"policy", "critic"}),
        (WARM_UP, 0, 1, set()),
        (WARM_UP, 0, 2, {"critic"}),
    ],
)
def test_only_models_that_may_be_rolled_back_are_copied(
    objective: dict[str, Any], step: int, updates: int, copied: set[str]
) -> None:
    rank = plain_rank(objective, updates=updates)
    rank.train(TrainingBatch(groups=tuple(sampled(3))), step, step + 1)
    models = {"policy": rank.policy, "critic": rank.critic}
    assert {name for name, model in models.items() if hasattr(model, "snapshot")} == copied


def test_a_model_that_cannot_be_read_is_an_error_of_all_ranks(tmp_path: Path) -> None:
    rank = plain_rank({})
    rank._release = lambda: None
    rank.forward.describe = lambda *_models: None
    with pytest.raises(LearnerLostError, match="^learner rank 0: .*nothing-here"):
        rank.start_stage(rank.stage, tmp_path / "nothing-here", None, None)


def test_a_folder_that_is_refused_is_no_lost_rank(tmp_path: Path) -> None:
    # New ranks would refuse it too.
    rank = plain_rank({})
    rank._release = lambda: None
    rank.forward.describe = lambda *_models: None
    rank.policy.module.float().save_pretrained(tmp_path)
    tensors = dict(read_tensors(tmp_path, "model"))
    del tensors["model.norm.weight"]
    write_tensors(tensors.items(), tmp_path, "model", writes=True)
    with pytest.raises(ConfigError, match=r"^learner rank 0: model folder .* tensor model\.norm\.weight is missing"):
        rank.start_stage(rank.stage, tmp_path, None, None)


def test_a_tensor_that_cannot_be_gathered_is_an_error_of_all_ranks_and_of_the_actors() -> None:
    rank, gathered = plain_rank({}), []

    def refuse(parameter: Any) -> Any:
        gathered.append(parameter)
        if len(gathered) == 3:
            raise RuntimeError("out of memory")
        return parameter.detach()

    rank.policy.gather = refuse
    sender = ObjectStoreSender(lambda data: data.nbytes, 1)
    with pytest.raises(LearnerLostError, match="learner rank 0: RuntimeError: out of memory"):
        rank.send(sender, 3, ())
    asked = partial(BucketRequest, version=3, attempt=0, member="0.0")
    assert sender.take(asked(index=0)).ready
    with pytest.raises(LearnerLostError, match="weight version 3 was never complete: RuntimeError: out of memory"):
        sender.take(asked(index=2))
    rank.policy.gather = lambda parameter: parameter.detach()
    manifest = rank.send(sender, 4, ())
    names = [tensor.name for bucket in manifest.buckets for tensor in bucket.tensors]
    assert set(names) >= set(dict(rank.policy.module.named_parameters()))


def test_step_pairs_with_one_side_a_prefix_of_the_other_are_counted() -> None:
    def pair(chosen: Sequence[int], rejected: Sequence[int]) -> StepPreference:
        values = {"chosen_value": 1.0, "rejected_value": 0.0, "chosen_visits": 1, "rejected_visits": 1}
        return StepPreference(prefix_ids=ids(1, 2), chosen_ids=ids(*chosen), rejected_ids=ids(*rejected), **values)

    searched = replace(tree(), step_preferences=(pair([3, 4], [3, 5]), pair([3], [3, 5]), pair([3, 4], [3])))
    batch = TrainingBatch(groups=(searched, replace(searched, step_preferences=searched.step_preferences[:2])))
    metrics = {
        pairs: plain_rank({"preference": {"weight": 1.0, "pairs": pairs}}).train(batch, 0, 1)
        for pairs in ("steps", "chains")
    }
    assert metrics["steps"]["preference/left_out"] == 3
    assert metrics["steps"]["objective/preference_denominator"] == 2
    assert set(metrics["steps"]) <= set(METRICS)
    assert "preference/left_out" not in metrics["chains"]


def test_the_reference_policy_itself_has_a_margin_of_zero() -> None:
    # The pairs of trees are compared with the reference policy, which is the policy itself here.
    rank = plain_rank({"preference": {"weight": 1.0}, "policy": {"weight": 0.0}})
    rank.reference = ReferencePolicy(copy.deepcopy(rank.policy.module), rank.settings)
    metrics = rank.train(TrainingBatch(groups=(tree(), tree())), 0, 1)
    assert metrics["preference/margin"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["objective/preference_loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_hidden_tokens_of_a_step_follow_from_its_version() -> None:
    batch = TrainingBatch(demonstrations=(chain(list(range(5, 25)), 1), chain(list(range(25, 45)), 1)))

    def weights(share: float, version: int) -> Tensor:
        rank = plain_rank({"sft": {"mask_share": share}}, stage="sft")
        rank.train(batch, 0, version)
        return rank.policy.vector()

    assert torch.equal(weights(0.5, 7), weights(0.5, 7))
    assert not torch.allclose(weights(0.5, 7), weights(0.5, 8))
    assert not torch.allclose(weights(0.5, 7), weights(0.0, 7))
    torch.testing.assert_close(weights(0.0, 7), weights(0.0, 8))  # only the order of the sum differs
