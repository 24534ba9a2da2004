"""Metrics of sampled and searched groups, and of engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import group, prompt, searched_group, trajectory

from rlsys.config.objective import PolicyConfig
from rlsys.control.rollout_metrics import engine_metrics, generated_tokens, rollout_metrics
from rlsys.interfaces import EngineStats
from rlsys.run.metrics import METRICS
from rlsys.trees import Role
from rlsys.types import Demonstration, Preference, StepPreference, TrajectoryGroup

IDS = np.arange(3, dtype=np.int32)
PAIR = Preference(chosen_ids=IDS, rejected_ids=IDS, prompt_length=1, common=1)
STEP = StepPreference(
    prefix_ids=IDS,
    chosen_ids=IDS,
    rejected_ids=IDS,
    chosen_value=1.0,
    rejected_value=0.0,
    chosen_visits=2,
    rejected_visits=2,
)
SHOWN = Demonstration(token_ids=IDS, loss_mask=IDS > 0)
# Figures of sampled and searched groups together.
BOTH = {"rollout/staleness_mean", "rollout/staleness_max", "rollout/generated_tokens"}


def test_figures_of_trees_by_hand() -> None:
    first = replace(
        searched_group(prompt("a"), 3, (1.0, 0.0, 0.5), simulations=8.0, calls=9.0, defects=2.0, duplicates=1.0),
        pairs=(PAIR, PAIR),
        demonstrations=(SHOWN,),
    )
    second = replace(
        searched_group(prompt("b"), 5, (0.0,), simulations=4.0, backtracks=3.0, verifier_errors=1.0, values=7.0),
        step_preferences=(STEP,),
    )
    metrics = rollout_metrics([first, second], version=5)
    assert {name: value for name, value in metrics.items() if name.startswith("search/")} == {
        "search/trees": 2,
        "search/solved": 1 / 2,
        "search/reward": 1.5 / 4,
        "search/simulations": 12,
        "search/calls": 9,
        "search/tokens": 20,
        "search/scored": 4,
        "search/correct": 2,
        "search/defects": 2,
        "search/duplicates": 1,
        "search/backtracks": 3,
        "search/verifier_errors": 1,
        "search/replies": 0,
        "search/environment_errors": 0,
        "search/values": 7,
        "search/value_errors": 0,
        # the thought and three answers, and the thought and one answer: 6 nodes of a token each, of 20 generated
        "search/trained_share": 6 / 20,
        "search/pairs": 2,
        "search/step_preferences": 1,
        "search/demonstrations": 1,
    }
    assert {name for name in metrics if name.startswith("rollout/")} == BOTH
    assert (metrics["rollout/staleness_mean"], metrics["rollout/staleness_max"]) == ((2 + 0) / 2, 2)


def test_every_figure_of_a_search_is_in_the_registry_and_made() -> None:
    metrics = rollout_metrics([searched_group(prompt("a")), group(prompt("b"))], 0)
    assert set(metrics) <= set(METRICS)
    assert {name for name in METRICS if name.startswith("search/")} <= set(metrics)


def test_searched_groups_do_not_touch_the_figures_of_sampled_ones() -> None:
    sampled = [group(prompt("a"), 1), group(prompt("b"), 2, (0.0, 0.0))]
    alone = rollout_metrics(sampled, 2)
    mixed = rollout_metrics([sampled[0], searched_group(prompt("c"), 2, (0.0,) * 5), sampled[1]], 2)
    assert {name: mixed[name] for name in alone if name not in BOTH} == {
        name: value for name, value in alone.items() if name not in BOTH
    }
    assert not any(name.startswith("search/") for name in alone)
    assert mixed["rollout/staleness_mean"] == pytest.approx((1 + 0 + 0) / 3)


def test_a_tree_of_another_model_is_never_stale_and_trains_nothing() -> None:
    other = replace(searched_group(prompt("a"), 0, (1.0,)), trajectories=())
    metrics = rollout_metrics([other], 9)
    assert (metrics["rollout/staleness_max"], metrics["search/trained_share"], metrics["search/reward"]) == (0, 0, 1)


def test_every_generated_token_of_a_step_is_counted() -> None:
    # Sampled: 2 and 6 tokens, of which the unjudged ones were generated too. Trees: 10 tokens, of which 3 and 1 are in
    # trajectories, and 7 of another model. 5 were generated for what is not here.
    sampled = TrajectoryGroup(
        prompt=prompt("a"), trajectories=(trajectory(length=2), trajectory(0, 0.0, "timeout", length=6))
    )
    tree = searched_group(prompt("b"))
    other = replace(searched_group(prompt("c"), tokens=7.0), trajectories=())
    assert [generated_tokens(each) for each in (sampled, tree, other)] == [8, 10, 7]
    assert rollout_metrics([sampled, tree, other], 0, 5)["rollout/generated_tokens"] == 8 + 10 + 7 + 5
    assert rollout_metrics([sampled], 0)["rollout/generated_tokens"] == 8


def test_a_group_with_one_verdict_has_no_advantage() -> None:
    # Two verdicts that differ; one verdict and a timeout, which has no reward; no verdict.
    lone = TrajectoryGroup(prompt=prompt("a"), trajectories=(trajectory(), trajectory(0, 0.0, "timeout")))
    none = TrajectoryGroup(prompt=prompt("a"), trajectories=(trajectory(0, 0.0, "error"),) * 2)
    metrics = rollout_metrics([group(prompt("a")), lone, none], 0)
    assert metrics["rollout/zero_advantage_groups"] == 2 / 3
    assert metrics["rollout/group_reward_std"] == pytest.approx(0.5 / 3, rel=1e-12)


def test_unjudged_and_forced_tokens_are_not_trained() -> None:
    made = searched_group(prompt("a"), 0, (1.0, 0.0))
    first, second = made.trajectories
    forced = replace(first, loss_mask=np.array([False, False, False, True, False]))
    metrics = rollout_metrics([replace(made, trajectories=(forced, replace(second, outcome="error")))], 0)
    assert metrics["search/trained_share"] == 1 / 10


def test_a_search_without_an_answer_has_figures() -> None:
    metrics = rollout_metrics([searched_group(prompt("a"), 0, (), tokens=0.0)], 0)
    assert (metrics["search/reward"], metrics["search/solved"], metrics["search/trained_share"]) == (0, 0, 0)


def usage(model: Role, busy_s: float, tokens: int = 0, prompt_tokens: int = 0, cached: int = 0) -> EngineStats:
    """Return the stats of an engine over 4 seconds."""
    return EngineStats(
        model=model,
        engine=0,
        busy_s=busy_s,
        wall_s=4.0,
        generated_tokens=tokens,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached,
        in_flight_mean=1.0,
    )


def test_figures_of_engines_by_hand() -> None:
    # Actors: 12 tokens in 2 s and 8 in 1 s, one had nothing to do. The reviewer's tokens are no rollout of an actor.
    usages = [usage("policy", 2.0, 12, 30, 10), usage("policy", 1.0, 8, 10, 10), usage("policy", 0.0)]
    metrics = engine_metrics([*usages, usage("reviewer", 3.0, 99, 40, 0)])
    assert metrics == {
        "rollout/tokens_per_s": 12 / 2 + 8 / 1,
        "rollout/prefix_cache_hits": 20 / 80,
        "rollout/idle_policy": (2 / 4 + 3 / 4 + 4 / 4) / 3,
        "rollout/idle_reviewer": 1 / 4,
    }
    assert all(METRICS[name].volatile for name in metrics)


def test_groups_with_equal_rewards_are_those_of_the_shaped_rewards() -> None:
    short, long = trajectory(length=4), trajectory(length=8)
    apart = replace(group(prompt("a")), trajectories=(short, long))
    level = replace(group(prompt("b")), trajectories=(replace(short, reward=0.5), long))  # 1 - 0.5
    shaping = PolicyConfig(overlong_buffer=4, overlong_penalty=0.5).overlong_shaping(8)
    assert rollout_metrics([apart, level], 0)["rollout/zero_advantage_groups"] == 0.5
    assert [shaping.rewards_differ(each) for each in (apart, level)] == [True, False]
    assert rollout_metrics([apart, apart], 0, shaping=shaping)["rollout/zero_advantage_groups"] == 0


def test_engines_that_had_nothing_to_do_and_one_that_ended_a_long_step() -> None:
    assert engine_metrics([usage("policy", 0.0), usage("model", 5.0)]) == {
        "rollout/tokens_per_s": 0,
        "rollout/idle_policy": 1,
        "rollout/idle_model": 0,
    }


def test_figures_of_episodes_by_hand() -> None:
    # Prompts have 3 tokens. The first episode has 3 tokens of the policy and 2 of the environment after it.
    ids, own = np.arange(8, dtype=np.int32), np.array([0, 0, 0, 1, 1, 0, 0, 1], dtype=np.bool_)
    parts = {"task": 0.5, "environment": 1.5}
    base = trajectory()
    first = replace(base, token_ids=ids, loss_mask=own, turns=2, reward=2.0, parts=parts)
    second = replace(base, token_ids=ids[:4], loss_mask=own[:4], turns=1, reward=1.0, finish_reason="turns")
    failed = replace(second, turns=1, finish_reason="length", outcome="error", environment_failed=True)
    asked = replace(prompt("a"), token_ids=ids[:3])
    metrics = rollout_metrics([TrajectoryGroup(prompt=asked, trajectories=(first, second, failed))], 0)
    assert metrics["rollout/turns"] == pytest.approx(4 / 3)
    assert metrics["rollout/out_of_turns_rate"] == metrics["rollout/truncated_rate"] == pytest.approx(1 / 3)
    assert metrics["rollout/environment_share"] == pytest.approx(2 / 7)
    assert metrics["rollout/environment_errors"] == metrics["rollout/verifier_errors"] == 1
    assert metrics["rollout/tokens"] == 5, "tokens of the environment were not generated"
    # The second episode has no reward of the environment.
    assert metrics["rewards/environment"] == 0.75 and metrics["rewards/task"] == 0.75
    assert metrics["rollout/reward"] == 1.5
    single = rollout_metrics([group(prompt("b"))], 0)
    assert not {name for name in single if "environment" in name or "turns" in name}
