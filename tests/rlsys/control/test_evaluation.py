"""Held-out figures by hand, and the figures of a step's groups."""

from __future__ import annotations

import asyncio
import itertools
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
from rlsys.stats import mean_difference, mean_over_prompts, pass_at_k
from rlsys.types import Prompt, SamplingSettings, Trajectory, TrajectoryGroup


def test_pass_at_k_by_hand() -> None:
    # 4 samples, 0, 1, 2 and 4 of them right. One of 2 draws is right:
    # 1 - C(4,2)/C(4,2) = 0; 1 - C(3,2)/6 = 1 - 3/6; 1 - C(2,2)/6 = 1 - 1/6; 1 - C(0,2)/6 = 1.
    values = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]], dtype=bool)
    assert pass_at_k(values, 2)[:, 0] == pytest.approx([0, 1 / 2, 5 / 6, 1], abs=1e-15)
    assert pass_at_k(values, 1)[:, 0] == pytest.approx([0, 1 / 4, 1 / 2, 1], abs=1e-15)
    assert pass_at_k(values, 4)[:, 0].tolist() == [0, 1, 1, 1]


@given(row=st.lists(st.booleans(), min_size=1, max_size=7), data=st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(row: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    draws = list(itertools.combinations(row, k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert pass_at_k(np.array([row]), k)[0, 0] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_outside_the_samples(k: int) -> None:
    with pytest.raises(ValueError, match=r"samples \(2\)"):
        pass_at_k(np.zeros((1, 2), dtype=bool), k)


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_an_interval_contains_its_mean_and_stays_in_range(rows: list[list[bool]]) -> None:
    found = mean_over_prompts(np.array(rows))
    assert found.mean == pytest.approx(np.mean(rows), abs=1e-12)
    assert -1e-12 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1 + 1e-12


def test_an_interval_is_that_of_whole_prompts() -> None:
    # 100 prompts, half of them right in all 4 samples: the standard error is sqrt(0.25 / 100) = 0.05, so
    # 0.5 -+ 1.96 * 0.05 = (0.402, 0.598). Counting 400 independent samples would halve the width.
    values = np.repeat([[True], [False]], 50, axis=0).repeat(4, axis=1)
    found = mean_over_prompts(values)
    assert found.low == pytest.approx(0.402, abs=0.01)  # 2000 resamples: the quantile is off by about 0.003
    assert found.high == pytest.approx(0.598, abs=0.01)
    assert mean_over_prompts(values) == found


def test_an_interval_at_the_edge_is_not_a_point() -> None:
    # Wilson at z = 1.96 and 5 prompts: z^2 = 3.841, 5 / 8.841 = 0.5655 and 3.841 / 8.841 = 0.4345.
    right, wrong = mean_over_prompts(np.ones((5, 2))), mean_over_prompts(np.zeros((5, 2)))
    assert (right.mean, right.high, wrong.mean, wrong.low) == (1, 1, 0, 0)
    assert right.low == pytest.approx(0.5655, abs=1e-4)
    assert wrong.high == pytest.approx(0.4345, abs=1e-4)


def test_a_difference_is_that_of_pairs() -> None:
    # 100 prompts. The second is right where the first is, and in half of the others too: differences are 0 and -1,
    # 75 and 25 times, of variance 0.25 * 0.75, so -0.25 -+ 1.96 * sqrt(0.1875 / 100) = (-0.335, -0.165).
    # Drawn apart, they would have the variances 0.25 and 0.1875, and half a width of 0.130 in place of 0.085.
    first, second = np.repeat([True, False], 50), np.repeat([True, False], [75, 25])
    found = mean_difference(first, second)
    assert found.mean == pytest.approx(-0.25, abs=1e-15)
    assert (found.low, found.high) == (pytest.approx(-0.335, abs=0.01), pytest.approx(-0.165, abs=0.01))
    # As often right as wrong where the other is not: the mean is 0 and the standard error 1 / sqrt(100).
    against = mean_difference(first, ~first)
    assert (against.mean, against.low) == (0, pytest.approx(-0.196, abs=0.02))


@pytest.mark.parametrize(("first", "second", "low", "high"), [(1, 1, -0.4345, 0.4345), (1, 0, 0.5655, 1)])
def test_equal_differences_say_not_all(first: float, second: float, low: float, high: float) -> None:
    # Wilson at 5 prompts, as above: 3.841 / 8.841 = 0.4345.
    found = mean_difference(np.full(5, first), np.full(5, second))
    assert found.mean == first - second
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@settings(deadline=None, max_examples=40)
@given(actors=st.integers(1, 6), count=st.integers(0, 15))
def test_groups_come_back_in_the_order_of_the_prompts(actors: int, count: int) -> None:
    prompts = [prompt(f"p{number}") for number in range(count)]
    groups = asyncio.run(sample_groups(FakePool(actors, []), prompts, SAMPLING, 0.1))
    assert [found.prompt.prompt_id for found in groups] == [p.prompt_id for p in prompts]


def test_a_failed_rollout_is_not_left_out_of_a_figure() -> None:
    prompts = [prompt(f"p{number}") for number in range(5)]
    pool = FakePool(2, [], failing=["p3", "p4"])
    with pytest.raises(TooManyFailuresError, match="2 of 5 evaluation rollouts failed; the first: scripted"):
        asyncio.run(sample_groups(pool, prompts, SAMPLING, 1.0))


def test_a_verifier_that_fails_is_an_error_and_no_figure() -> None:
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
    timeout = trajectory(reward=0, outcome="timeout", answered=False, length=6)
    found = held_out_metrics([of(right), of(silent)], [of(right, wrong), of(timeout, wrong)])
    assert found == {
        "held_out/greedy_accuracy": 1 / 2,
        "held_out/greedy_no_answer_rate": 1 / 2,
        "held_out/sampled_accuracy": 1 / 4,
        "held_out/sampled_no_answer_rate": 0,  # of the timeout nothing is known
        "held_out/verifier_error_rate": 1 / 6,
        "held_out/pass_at_k": 1 / 2,  # of 2 samples: one of the first prompt's is right
        "held_out/completion_length": (2 + 4 + 6 + 4) / 4,  # of the sampled part
    }
    assert set(found) <= set(METRICS)


def test_only_what_was_measured_is_reported() -> None:
    greedy = [group(prompt("p"), rewards=[1.0])]
    assert "held_out/pass_at_k" not in held_out_metrics(greedy, [])
    assert held_out_metrics(greedy, [])["held_out/completion_length"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held_out_metrics([], []) == {}


def test_an_ok_without_reward_is_not_solved() -> None:
    found = TrajectoryGroup(prompt=prompt("p"), trajectories=(trajectory(reward=0.0), trajectory(reward=0.5)))
    assert solved([found]).tolist() == [[False, True]]


def test_rollout_metrics_by_hand() -> None:
    first = TrajectoryGroup(
        prompt=prompt("a"),
        trajectories=(trajectory(3, 1.0), trajectory(4, 0.0, "wrong", answered=False, length=6)),
    )
    second = TrajectoryGroup(
        prompt=prompt("b"), trajectories=(trajectory(5, 0.1), trajectory(5, 0.0, "timeout", answered=False))
    )
    found = rollout_metrics([first, second], version=5)
    assert found["rollout/reward"] == pytest.approx(1.1 / 3, rel=1e-12)  # the timeout has no verdict
    assert found["rollout/accuracy"] == 2 / 4
    assert found["rollout/no_answer_rate"] == 1 / 4
    assert found["rollout/completion_length"] == (2 + 6 + 2 + 2) / 4
    assert found["rollout/completion_length_max"] == 6
    assert found["rollout/tokens"] == 12
    assert found["rollout/group_reward_std"] == pytest.approx((0.5 + 0) / 2, rel=1e-12)  # the second has one reward
    assert found["rollout/zero_advantage_groups"] == 1 / 2
    assert found["rollout/verifier_errors"] == 1
    assert found["rollout/truncated_rate"] == 0
    assert found["rollout/staleness_mean"] == (2 + 0) / 2  # 5 - 3, the oldest of the first group, and 5 - 5
    assert found["rollout/staleness_max"] == 2
    assert set(found) <= set(METRICS)


def test_equal_rewards_that_floating_point_cannot_average_have_no_advantage() -> None:
    # numpy's standard deviation of three times 0.1 is 1.4e-17.
    assert np.std([0.1] * 3) > 0
    found = rollout_metrics([group(prompt("a"), rewards=[0.1] * 3), group(prompt("b"), rewards=[1, 0])], 0)
    assert found["rollout/zero_advantage_groups"] == 1 / 2


def test_a_step_in_which_every_verifier_failed_has_a_row() -> None:
    failed = TrajectoryGroup(prompt=prompt("a"), trajectories=(trajectory(0, 0.0, "error"),) * 2)
    assert rollout_metrics([failed], 0)["rollout/reward"] == 0
