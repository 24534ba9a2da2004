"""Held-out metrics, their intervals, and the metrics of the groups of a step, by hand."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from fakes import SAMPLING, FakePool, group, prompt, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.control.evaluation import error_rate, held_out_metrics, sample_groups, solved
from rlsys.control.rollout_metrics import rollout_metrics
from rlsys.errors import TooManyFailuresError
from rlsys.run.metrics import METRICS
from rlsys.types import Prompt, SamplingSettings, Trajectory, TrajectoryGroup


@settings(deadline=None, max_examples=40)
@given(actors=st.integers(1, 6), count=st.integers(0, 15))
def test_groups_come_back_in_the_order_of_the_prompts(actors: int, count: int) -> None:
    prompts = [prompt(f"p{number}") for number in range(count)]
    groups = asyncio.run(sample_groups(FakePool(actors, []), prompts, SAMPLING, 0.1))
    assert [each.prompt.prompt_id for each in groups] == [p.prompt_id for p in prompts]


def test_a_failed_rollout_fails_the_evaluation() -> None:
    prompts = [prompt(f"p{number}") for number in range(5)]
    pool = FakePool(2, [], failing=["p3", "p4"])
    with pytest.raises(TooManyFailuresError, match="2 of 5 evaluation rollouts failed; the first: scripted"):
        asyncio.run(sample_groups(pool, prompts, SAMPLING, 1.0))


def test_a_verifier_that_fails_too_often_fails_the_evaluation() -> None:
    class Broken(FakePool):
        async def generate(
            self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
        ) -> Sequence[TrajectoryGroup]:
            bad = replace(trajectory(0, 0.0, "error", answered=False), detail="scripted")
            return [
                TrajectoryGroup(prompt=p, trajectories=(bad if p.prompt_id in self.failing else trajectory(),))
                for p in prompts
            ]

    prompts = [prompt(f"p{number}") for number in range(10)]
    # 2 of 10 are more than 0.1, and not more than 0.2; 1 of 10 is neither.
    two = Broken(2, [], failing=["p3", "p4"])
    with pytest.raises(
        TooManyFailuresError, match=r"2 of 10 verifications .* train\.max_verifier_failures = 0\.1; .*scripted"
    ):
        asyncio.run(sample_groups(two, prompts, SAMPLING, 0.1))
    assert error_rate(asyncio.run(sample_groups(two, prompts, SAMPLING, 0.2))) == pytest.approx(0.2)
    one = Broken(2, [], failing=["p3"])
    assert error_rate(asyncio.run(sample_groups(one, prompts, SAMPLING, 0.1))) == pytest.approx(0.1)


def test_held_out_metrics_by_hand() -> None:
    def of(*trajectories: Trajectory) -> TrajectoryGroup:
        return TrajectoryGroup(prompt=prompt("p"), trajectories=trajectories)

    silent = trajectory(reward=0, outcome="wrong", answered=False, length=8)
    right = trajectory(length=2)
    wrong = trajectory(reward=0, outcome="wrong", length=4)
    near = trajectory(reward=0.5, outcome="wrong", length=4)
    timeout = trajectory(reward=9, outcome="timeout", answered=False, length=6)
    metrics = held_out_metrics([of(right), of(silent)], [of(right, wrong), of(timeout, near)])
    assert metrics == {
        "held_out/greedy_accuracy": 1 / 2,
        "held_out/greedy_accuracy_low": 0,  # both prompts drawn are the wrong one in 1 of 4 draws of the bootstrap
        "held_out/greedy_accuracy_high": 1,
        "held_out/greedy_no_answer_rate": 1 / 2,
        "held_out/greedy_reward": 1 / 2,
        "held_out/sampled_accuracy": 1 / 4,
        "held_out/sampled_accuracy_low": 0,
        "held_out/sampled_accuracy_high": 1 / 2,
        "held_out/sampled_no_answer_rate": 0,  # of the timeout nothing is known
        "held_out/sampled_reward": (1 + 0 + 0.5) / 3,  # the timeout has none
        "held_out/verifier_error_rate": 1 / 6,
        "held_out/pass_at_k": 1 / 2,  # of 2 samples: one of the first prompt's is right
        "held_out/completion_length": (2 + 4 + 6 + 4) / 4,  # of the sampled part
    }
    assert set(metrics) <= set(METRICS)


def test_only_what_was_measured_is_reported() -> None:
    greedy = [group(prompt("p"), rewards=[1.0])]
    assert "held_out/pass_at_k" not in held_out_metrics(greedy, [])
    assert held_out_metrics(greedy, [])["held_out/completion_length"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held_out_metrics([], []) == {}


def test_an_ok_without_reward_is_not_solved() -> None:
    mixed = TrajectoryGroup(prompt=prompt("p"), trajectories=(trajectory(reward=0.0), trajectory(reward=0.5)))
    assert solved([mixed]).tolist() == [[False, True]]


def test_rollout_metrics_by_hand() -> None:
    first = TrajectoryGroup(
        prompt=prompt("a"),
        trajectories=(trajectory(3, 1.0), trajectory(4, 0.0, "wrong", answered=False, length=6)),
    )
    second = TrajectoryGroup(
        prompt=prompt("b"), trajectories=(trajectory(5, 0.1), trajectory(5, 0.0, "timeout", answered=False))
    )
    metrics = rollout_metrics([first, second], version=5)
    assert metrics["rollout/reward"] == pytest.approx(1.1 / 3, rel=1e-12)  # the timeout has no verdict
    assert metrics["rollout/accuracy"] == 2 / 4
    assert metrics["rollout/no_answer_rate"] == 1 / 4
    assert metrics["rollout/completion_length"] == (2 + 6 + 2 + 2) / 4
    assert metrics["rollout/completion_length_max"] == 6
    assert metrics["rollout/tokens"] == 12
    assert metrics["rollout/group_reward_std"] == pytest.approx((0.5 + 0) / 2, rel=1e-12)  # the second has one reward
    assert metrics["rollout/zero_advantage_groups"] == 1 / 2
    assert metrics["rollout/verifier_errors"] == 1
    assert metrics["rollout/truncated_rate"] == 0
    assert metrics["rollout/staleness_mean"] == (2 + 0) / 2  # 5 - 3, the oldest of the first group, and 5 - 5
    assert metrics["rollout/staleness_max"] == 2
    assert set(metrics) <= set(METRICS)


def test_equal_rewards_that_floating_point_cannot_average_have_no_advantage() -> None:
    # numpy's standard deviation of three times 0.1 is 1.4e-17.
    assert np.std([0.1] * 3) > 0
    metrics = rollout_metrics([group(prompt("a"), rewards=[0.1] * 3), group(prompt("b"), rewards=[1, 0])], 0)
    assert metrics["rollout/zero_advantage_groups"] == 1 / 2


def test_a_step_in_which_every_verifier_failed_has_a_row() -> None:
    failed = TrajectoryGroup(prompt=prompt("a"), trajectories=(trajectory(0, 0.0, "error"),) * 2)
    assert rollout_metrics([failed], 0)["rollout/reward"] == 0
