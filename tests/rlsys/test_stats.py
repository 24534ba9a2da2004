"""Confidence intervals and pass@k, against figures derived by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.stats import bootstrap_mean, mean_difference, mean_over_prompts, pass_at_k


def test_pass_at_k_by_hand() -> None:
    # 4 samples, 0, 1, 2 and 4 of them right. One of 2 draws is right:
    # 1 - C(4,2)/C(4,2) = 0; 1 - C(3,2)/6 = 1 - 3/6; 1 - C(2,2)/6 = 1 - 1/6; 1 - C(0,2)/6 = 1.
    values = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]], dtype=bool)
    assert pass_at_k(values, 2)[:, 0] == pytest.approx([0, 1 / 2, 5 / 6, 1], abs=1e-15)
    assert pass_at_k(values, 1)[:, 0] == pytest.approx([0, 1 / 4, 1 / 2, 1], abs=1e-15)
    assert pass_at_k(values, 4)[:, 0].tolist() == [0, 1, 1, 1]


@given(row=st.lists(st.booleans(), min_size=1, max_size=7), data=st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(row: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    draws = list(itertools.combinations(row, k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert pass_at_k(np.array([row]), k)[0, 0] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_needs_k_between_1_and_the_samples(k: int) -> None:
    with pytest.raises(ValueError, match=r"samples \(2\)"):
        pass_at_k(np.zeros((1, 2), dtype=bool), k)


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_an_interval_contains_its_mean_and_stays_in_range(rows: list[list[bool]]) -> None:
    estimate = mean_over_prompts(np.array(rows))
    assert estimate.mean == pytest.approx(np.mean(rows), abs=1e-12)
    assert -1e-12 <= estimate.low <= estimate.mean + 1e-12
    assert estimate.mean - 1e-12 <= estimate.high <= 1 + 1e-12


def test_the_bootstrap_draws_whole_prompts() -> None:
    # 100 prompts, half of them right in all 4 samples: the standard error is sqrt(0.25 / 100) = 0.05, so
    # 0.5 -+ 1.96 * 0.05 = (0.402, 0.598). Counting 400 independent samples would halve the width.
    values = np.repeat([[True], [False]], 50, axis=0).repeat(4, axis=1)
    estimate = mean_over_prompts(values)
    assert estimate.low == pytest.approx(0.402, abs=0.01)  # 2000 resamples: the quantile is off by about 0.003
    assert estimate.high == pytest.approx(0.598, abs=0.01)
    assert mean_over_prompts(values) == estimate


def test_the_interval_of_a_mean_that_is_no_share() -> None:
    # Lengths 1 and 3, half each, of 100 prompts: 2 -+ 1.96 * 1 / sqrt(100). A mean length of 1 is not a share of 1.
    estimate = bootstrap_mean(np.repeat([[1], [3]], 50, axis=0))
    assert (estimate.low, estimate.high) == (pytest.approx(1.804, abs=0.03), pytest.approx(2.196, abs=0.03))
    assert bootstrap_mean(np.ones((5, 2))).low == 1


def test_an_interval_at_0_or_1_is_not_a_point() -> None:
    # Wilson at z = 1.96 and 5 prompts: z^2 = 3.841, 5 / 8.841 = 0.5655 and 3.841 / 8.841 = 0.4345.
    right, wrong = mean_over_prompts(np.ones((5, 2))), mean_over_prompts(np.zeros((5, 2)))
    assert (right.mean, right.high, wrong.mean, wrong.low) == (1, 1, 0, 0)
    assert right.low == pytest.approx(0.5655, abs=1e-4)
    assert wrong.high == pytest.approx(0.4345, abs=1e-4)


def test_the_bootstrap_of_a_difference_draws_pairs() -> None:
    # 100 prompts. The second is right where the first is, and in half of the other prompts: differences are 0 and -1,
    # 75 and 25 times, of variance 0.25 * 0.75, so -0.25 -+ 1.96 * sqrt(0.1875 / 100) = (-0.335, -0.165).
    # Independent draws would have the variances 0.25 and 0.1875, and a half width of 0.130 instead of 0.085.
    first, second = np.repeat([True, False], 50), np.repeat([True, False], [75, 25])
    estimate = mean_difference(first, second)
    assert estimate.mean == pytest.approx(-0.25, abs=1e-15)
    assert (estimate.low, estimate.high) == (pytest.approx(-0.335, abs=0.01), pytest.approx(-0.165, abs=0.01))
    # Each is right in the 50 prompts in which the other is wrong: the mean is 0, the standard error 1 / sqrt(100).
    against = mean_difference(first, ~first)
    assert (against.mean, against.low) == (0, pytest.approx(-0.196, abs=0.02))


@pytest.mark.parametrize(("first", "second", "low", "high"), [(1, 1, -0.4345, 0.4345), (1, 0, 0.5655, 1)])
def test_equal_differences_have_an_interval(first: float, second: float, low: float, high: float) -> None:
    # Wilson at 5 prompts, as above: 3.841 / 8.841 = 0.4345.
    estimate = mean_difference(np.full(5, first), np.full(5, second))
    assert estimate.mean == first - second
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_prompts_of_one_group_count_together() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(40) < 0.4, rng.random(40) < 0.6
    labels, copies = np.repeat(np.arange(40), 5), 5
    alone = mean_over_prompts(first[:, None])
    together = mean_over_prompts(np.repeat(first, copies)[:, None], groups=labels)
    assert (together.mean, together.low, together.high) == pytest.approx((alone.mean, alone.low, alone.high))
    against = mean_difference(first, second)
    paired = mean_difference(np.repeat(first, copies), np.repeat(second, copies), groups=labels)
    assert (paired.mean, paired.low, paired.high) == pytest.approx((against.mean, against.low, against.high))
    apart = mean_over_prompts(np.repeat(first, copies)[:, None])
    assert apart.high - apart.low < 0.6 * (alone.high - alone.low)
    none = mean_over_prompts(np.zeros((200, 1)), groups=labels)
    assert none == mean_over_prompts(np.zeros((40, 1)))
