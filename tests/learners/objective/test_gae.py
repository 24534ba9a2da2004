"""Advantages of single tokens: returns, generalised advantage estimation and whitening."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.objective.advantages import WHITEN_EPSILON, gae, token_returns, whiten

few = settings(max_examples=50, deadline=None)
numbers = st.integers(-8, 8).map(lambda n: n / 4)
fractions = st.integers(0, 8).map(lambda n: n / 8)


def trained(tokens: int) -> np.ndarray:
    return np.ones(tokens, dtype=bool)


@st.composite
def token_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw rewards, values and mask; rewards and values are NaN or infinite where the mask is False."""
    mask = np.array(draw(st.lists(st.booleans(), max_size=12)), dtype=bool)
    rewards, values = (np.array([draw(numbers) for _ in mask], dtype=np.float64) for _ in range(2))
    rewards[~mask] = math.nan
    values[~mask] = math.inf
    return rewards, values, mask


def test_gae_by_hand():
    # gamma 1/2, lam 1/2; rewards 0 0 1, values 1 2 4
    # delta_2 = 1 - 4 = -3;  delta_1 = 1/2 * 4 - 2 = 0;  delta_0 = 1/2 * 2 - 1 = 0
    # A_2 = -3;  A_1 = 0 + 1/4 * -3 = -3/4;  A_0 = 0 + 1/4 * -3/4 = -3/16;  returns 13/16, 5/4, 1
    advantages, returns = gae(np.array([0.0, 0, 1]), np.array([1.0, 2, 4]), trained(3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-3 / 16, -3 / 4, -3.0]
    assert returns.tolist() == [13 / 16, 5 / 4, 1.0]


def test_masked_tokens_carry_value_and_advantage_through():
    # the three tokens above, with untrained tokens before, between and after them
    mask = np.array([False, True, False, False, True, True, False])
    rewards = np.array([math.nan, 0, 99, -99, 0, 1, 5])
    values = np.array([7, 1, math.inf, 3, 2, 4, math.nan])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.0, -3 / 16, 0.0, 0.0, -3 / 4, -3.0, 0.0]
    assert returns.tolist() == [0.0, 13 / 16, 0.0, 0.0, 5 / 4, 1.0, 0.0]


def test_returns_by_hand():
    # rewards 1 2 4, gamma 1/2: 4; 2 + 4/2 = 4; 1 + 4/2 = 3. The masked token between costs no factor of gamma.
    mask = np.array([True, False, True, True])
    assert token_returns(np.array([1.0, 99, 2, 4]), mask, 0.5).tolist() == [3.0, 0.0, 4.0, 4.0]


def test_nothing_to_train_is_nothing():
    for tokens in (0, 3):
        empty = np.zeros(tokens, dtype=bool)
        advantages, returns = gae(np.full(tokens, math.nan), np.ones(tokens), empty, gamma=1.0, lam=1.0)
        assert advantages.tolist() == returns.tolist() == [0.0] * tokens


@few
@given(row=token_rows(), gamma=fractions)
def test_returns_are_discounted_sums_over_the_trained_tokens(row, gamma):
    rewards, _, mask = row
    trained_rewards = rewards[mask]
    expected = [
        sum(gamma**far * reward for far, reward in enumerate(trained_rewards[place:]))
        for place in range(len(trained_rewards))
    ]
    returns = token_returns(rewards, mask, gamma)
    assert returns[mask] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert not returns[~mask].any()


@few
@given(row=token_rows(), gamma=fractions)
def test_with_lam_one_the_advantage_is_the_return_minus_the_value(row, gamma):
    rewards, values, mask = row
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    reward_to_go = token_returns(rewards, mask, gamma)
    assert returns == pytest.approx(reward_to_go, rel=1e-12, abs=1e-12)
    assert advantages[mask] == pytest.approx(reward_to_go[mask] - values[mask], rel=1e-12, abs=1e-12)


@few
@given(row=token_rows(), gamma=fractions)
def test_with_lam_zero_the_advantage_is_the_temporal_difference(row, gamma):
    rewards, values, mask = row
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=0.0)
    expected = rewards[mask] + gamma * np.append(values[mask], 0.0)[1:] - values[mask]
    assert advantages[mask] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@few
@given(row=token_rows())
def test_values_that_know_the_return_leave_no_advantage(row):
    rewards, _, mask = row
    exact = token_returns(rewards, mask, 0.5)
    advantages, returns = gae(rewards, exact, mask, gamma=0.5, lam=0.75)
    assert advantages == pytest.approx(0.0, abs=1e-12)
    assert returns == pytest.approx(exact, rel=1e-12, abs=1e-12)


def test_bad_input_of_gae_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        gae(np.zeros(3), np.zeros(2), trained(3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="one shape"):
        token_returns(np.zeros((1, 3)), np.ones((1, 3), dtype=bool), 1.0)
    with pytest.raises(ValueError, match="gamma and lam in"):
        gae(np.zeros(3), np.zeros(3), trained(3), gamma=1.0, lam=1.5)
    with pytest.raises(ValueError, match="gamma and lam in"):
        token_returns(np.zeros(3), trained(3), -0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_and_never_becomes_an_advantage(bad):
    spoilt = np.array([1.0, bad, 2.0])
    with pytest.raises(ValueError, match=f"^expected finite rewards of trained tokens, found {bad} among 1 of 3"):
        gae(spoilt, np.zeros(3), trained(3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=f"^expected finite values of trained tokens, found {bad} among 1 of 3"):
        gae(np.zeros(3), spoilt, trained(3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=f"^expected finite rewards of trained tokens, found {bad} among 1 of 3"):
        token_returns(spoilt, trained(3), 1.0)
    with pytest.raises(ValueError, match=f"^expected finite advantages of trained tokens, found {bad} among 1 of 5"):
        whiten([np.ones(2), spoilt], [trained(2), trained(3)])


def test_whiten_by_hand():
    # entries 1 3 5 7 over two rows: mean 4, squares 9 + 1 + 1 + 9 = 20 over n = 4, std sqrt 5
    masks = [np.array([True, False, True]), np.array([True, True])]
    first, second = whiten([np.array([1.0, math.nan, 3.0]), np.array([5.0, 7.0])], masks)
    unit = 1 / (math.sqrt(5) + 1e-8)
    assert first == pytest.approx([-3 * unit, 0.0, -unit], rel=1e-12)
    assert second == pytest.approx([unit, 3 * unit], rel=1e-12)


def test_equal_advantages_are_whitened_to_exactly_zero():
    rows = [np.full(2, 0.1), np.full(1, 0.1)]
    assert np.concatenate(rows).mean() != 0.1  # rounding
    assert [row.tolist() for row in whiten(rows, [trained(2), trained(1)])] == [[0.0, 0.0], [0.0]]


def test_whitening_where_nothing_is_trained():
    assert whiten([], []) == []
    (whitened,) = whiten([np.array([math.nan, 3.0])], [np.zeros(2, dtype=bool)])
    assert whitened.tolist() == [0.0, 0.0]


def test_whiten_needs_a_mask_for_every_row():
    with pytest.raises(ValueError, match="mask of every sample's shape"):
        whiten([np.zeros(2)], [])
    with pytest.raises(ValueError, match="mask of every sample's shape"):
        whiten([np.zeros(2)], [trained(3)])


@few
@given(flat=st.lists(numbers, min_size=2, max_size=20), mask=st.lists(st.booleans(), min_size=20, max_size=20))
def test_whitened_tokens_have_mean_zero_and_std_one(flat, mask):
    selected = np.array(mask[: len(flat)])
    (whitened,) = whiten([np.array(flat)], [selected])
    assert not whitened[~selected].any()
    if selected.any() and np.ptp(np.array(flat)[selected]) > 0:
        std = np.array(flat)[selected].std()
        assert whitened[selected].mean() == pytest.approx(0.0, abs=1e-12)
        assert whitened[selected].std() == pytest.approx(std / (std + WHITEN_EPSILON), rel=1e-12)
        assert np.argmax(whitened[selected]) == np.argmax(np.array(flat)[selected])


@few
@given(flat=st.lists(numbers, min_size=1, max_size=20), data=st.data())
def test_whitening_does_not_depend_on_how_tokens_are_grouped(flat, data):
    row = np.array(flat)
    mask = np.array([data.draw(st.booleans()) for _ in flat])
    cuts = data.draw(st.lists(st.integers(0, len(flat)), max_size=4).map(sorted))
    pieces = whiten(np.split(row, cuts), np.split(mask, cuts))
    assert np.concatenate(pieces) == pytest.approx(whiten([row], [mask])[0], rel=1e-12, abs=1e-12)
