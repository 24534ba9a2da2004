"""Group advantages against hand-made numbers and the identities between the published variants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learners.advantages import STD_EPSILON, group_advantages

ALL = np.array([True, True, True, True])
reward_lists = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=16)


def advantages(rewards: list[float], *, use_std: bool) -> np.ndarray:
    return group_advantages(np.array(rewards), np.ones(len(rewards), dtype=bool), use_std=use_std)


def test_grpo_by_hand():
    # mean 1/4; deviations 3/4, -1/4, -1/4, -1/4; squares 9/16 + 3/16 = 3/4; over n - 1 = 3: 1/4; std 1/2
    found = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), ALL, use_std=True)
    assert found == pytest.approx([0.75 / 0.500001] + [-0.25 / 0.500001] * 3, rel=1e-12)


def test_dr_grpo_by_hand():
    found = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), ALL, use_std=False)
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_invalid_entries_are_zero_and_do_not_move_the_baseline():
    # valid rewards 3 and 1: mean 2, deviations +-1, sum of squares 2 over n - 1 = 1: std sqrt(2)
    valid = np.array([True, False, True, False])
    found = group_advantages(np.array([3.0, math.nan, 1.0, 99.0]), valid, use_std=True)
    unit = 1 / (math.sqrt(2) + 1e-6)
    assert found == pytest.approx([unit, 0.0, -unit, 0.0], rel=1e-12)
    assert found[1] == found[3] == 0.0


@pytest.mark.parametrize("use_std", [True, False])
def test_equal_rewards_give_exactly_zero(use_std):
    rewards = np.full(3, 0.1)
    assert rewards.mean() != 0.1  # (0.1 + 0.1 + 0.1) / 3 rounds up: without care the advantage is -1.4e-17
    assert group_advantages(rewards, np.ones(3, dtype=bool), use_std=use_std).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_valid_rewards_say_nothing(count):
    valid = np.arange(4) < count
    assert group_advantages(np.array([5.0, 1.0, 2.0, 3.0]), valid, use_std=True).tolist() == [0.0] * 4


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="finite rewards"):
        group_advantages(np.array([1.0, math.inf, 0.0, 0.0]), ALL, use_std=True)
    with pytest.raises(ValueError, match="one shape"):
        group_advantages(np.array([1.0, 0.0]), ALL, use_std=True)


@given(rewards=reward_lists, use_std=st.booleans())
def test_a_group_sums_to_zero(rewards, use_std):
    assert abs(advantages(rewards, use_std=use_std).sum()) < 1e-12 * len(rewards)


@given(rewards=reward_lists)
def test_dr_grpo_is_grpo_without_the_division(rewards):
    std = np.std(rewards, ddof=1)
    grpo = advantages(rewards, use_std=True)
    assert advantages(rewards, use_std=False) == pytest.approx(grpo * (std + STD_EPSILON), rel=1e-12, abs=1e-15)


@given(rewards=reward_lists)
def test_rloo_is_dr_grpo_scaled(rewards):
    # R_i - mean_{j != i} R_j = R_i - (n mean - R_i) / (n - 1) = n / (n - 1) (R_i - mean)
    n, total = len(rewards), sum(rewards)
    rloo = [reward - (total - reward) / (n - 1) for reward in rewards]
    assert advantages(rewards, use_std=False) * n / (n - 1) == pytest.approx(rloo, rel=1e-12, abs=1e-14)


@given(rewards=reward_lists, use_std=st.booleans(), shift=st.integers(-4, 4))
def test_only_differences_of_rewards_matter(rewards, use_std, shift):
    moved = advantages([reward + shift for reward in rewards], use_std=use_std)
    assert moved == pytest.approx(advantages(rewards, use_std=use_std), rel=1e-9, abs=1e-12)


@given(rewards=reward_lists, use_std=st.booleans())
def test_a_better_reward_never_gets_a_lower_advantage(rewards, use_std):
    found = advantages(rewards, use_std=use_std)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    if max(rewards) > min(rewards):
        assert found[np.argmax(rewards)] > 0 > found[np.argmin(rewards)]
