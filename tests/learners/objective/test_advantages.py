"""Group advantages against hand-made numbers, and the identities between the published variants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learners.objective.advantages import STD_EPSILON, GroupEstimator, group_advantages

reward_lists = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=16)


def advantages(rewards: list[float], estimator: GroupEstimator) -> np.ndarray:
    return group_advantages(np.array(rewards), np.ones(len(rewards), dtype=bool), estimator=estimator)


CENTRED: tuple[GroupEstimator, ...] = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")


def test_grpo_by_hand():
    # mean 1/4; deviations 3/4, -1/4, -1/4, -1/4; squares 9/16 + 3/16 = 3/4; over n - 1 = 3: 1/4; std 1/2
    estimates = advantages([1.0, 0.0, 0.0, 0.0], "grpo")
    assert estimates == pytest.approx([0.75 / 0.500001] + [-0.25 / 0.500001] * 3, rel=1e-12)


@pytest.mark.parametrize("estimator", ["dr_grpo", "reinforce_pp_baseline"])
def test_distance_from_the_mean_by_hand(estimator):
    assert advantages([1.0, 0.0, 0.0, 0.0], estimator).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_rloo_by_hand():
    # the others' means are 0, 1/3, 1/3, 1/3
    assert advantages([1.0, 0.0, 0.0, 0.0], "rloo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3], rel=1e-12)


def test_reinforce_pp_is_the_reward_itself():
    valid = np.array([True, False, True, True])
    estimates = group_advantages(np.array([0.5, math.nan, -2.0, 0.5]), valid, estimator="reinforce_pp")
    assert estimates.tolist() == [0.5, 0.0, -2.0, 0.5]
    # Also with a single reward or equal rewards: the baseline comes later, from `whiten`.
    alone = group_advantages(np.array([0.5, 9.0]), np.array([True, False]), estimator="reinforce_pp")
    assert alone.tolist() == [0.5, 0.0]
    assert advantages([0.1, 0.1, 0.1], "reinforce_pp").tolist() == [0.1, 0.1, 0.1]


def test_invalid_entries_are_zero_and_do_not_move_the_baseline():
    # valid rewards 3 and 1: mean 2, deviations +-1, sum of squares 2 over n - 1 = 1: std sqrt(2)
    valid = np.array([True, False, True, False])
    rewards = np.array([3.0, math.nan, 1.0, 99.0])
    estimates = group_advantages(rewards, valid, estimator="grpo")
    unit = 1 / (math.sqrt(2) + 1e-6)
    assert estimates == pytest.approx([unit, 0.0, -unit, 0.0], rel=1e-12)
    assert estimates[1] == estimates[3] == 0.0
    # two valid rewards: each is compared with the other one, 3 - 1 and 1 - 3
    assert group_advantages(rewards, valid, estimator="rloo").tolist() == [2.0, 0.0, -2.0, 0.0]


@pytest.mark.parametrize("estimator", CENTRED)
def test_equal_rewards_give_exactly_zero(estimator):
    rewards = [0.1, 0.1, 0.1]
    assert np.mean(rewards) != 0.1  # (0.1 + 0.1 + 0.1) / 3 rounds up: without care the advantage is -1.4e-17
    assert advantages(rewards, estimator).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("estimator", CENTRED)
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_valid_rewards_say_nothing(count, estimator):
    valid = np.arange(4) < count
    assert group_advantages(np.array([5.0, 1.0, 2.0, 3.0]), valid, estimator=estimator).tolist() == [0.0] * 4


def test_bad_input_is_refused():
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^expected finite rewards of a group, found {bad} among 1 of 2"):
            advantages([1.0, bad], "reinforce_pp")
    with pytest.raises(ValueError, match="one shape"):
        group_advantages(np.array([1.0, 0.0]), np.ones(4, dtype=bool), estimator="grpo")
    with pytest.raises(ValueError, match="unknown estimator 'ppo'"):
        advantages([1.0, 0.0], "ppo")


@given(rewards=reward_lists, estimator=st.sampled_from(CENTRED))
def test_a_group_sums_to_zero(rewards, estimator):
    assert abs(advantages(rewards, estimator).sum()) < 1e-12 * len(rewards)


@given(rewards=reward_lists)
def test_dr_grpo_is_grpo_without_the_division(rewards):
    std = np.std(rewards, ddof=1)
    grpo = advantages(rewards, "grpo")
    assert advantages(rewards, "dr_grpo") == pytest.approx(grpo * (std + STD_EPSILON), rel=1e-12, abs=1e-15)


@given(rewards=reward_lists)
def test_rloo_leaves_one_out_and_is_dr_grpo_scaled(rewards):
    n, total = len(rewards), sum(rewards)
    left_out = [reward - (total - reward) / (n - 1) for reward in rewards]
    estimates = advantages(rewards, "rloo")
    assert estimates == pytest.approx(left_out, rel=1e-12, abs=1e-14)
    assert estimates == pytest.approx(advantages(rewards, "dr_grpo") * n / (n - 1), rel=1e-12, abs=1e-14)


@given(rewards=reward_lists, estimator=st.sampled_from(CENTRED), shift=st.integers(-4, 4))
def test_only_differences_of_rewards_matter(rewards, estimator, shift):
    moved = advantages([reward + shift for reward in rewards], estimator)
    assert moved == pytest.approx(advantages(rewards, estimator), rel=1e-9, abs=1e-12)


@given(rewards=reward_lists, estimator=st.sampled_from(CENTRED))
def test_a_better_reward_never_gets_a_lower_advantage(rewards, estimator):
    estimates = advantages(rewards, estimator)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(estimates[order]) >= 0).all()
    if max(rewards) > min(rewards):
        assert estimates[np.argmax(rewards)] > 0 > estimates[np.argmin(rewards)]


@given(rewards=reward_lists, estimator=st.sampled_from((*CENTRED, "reinforce_pp")), data=st.data())
def test_the_order_of_completions_changes_nothing(rewards, estimator, data):
    order = data.draw(st.permutations(range(len(rewards))))
    shuffled = advantages([rewards[place] for place in order], estimator)
    assert shuffled == pytest.approx(advantages(rewards, estimator)[list(order)], rel=1e-9, abs=1e-12)
