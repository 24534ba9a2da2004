"""Check how one answer is chosen among several, and when the votes decide."""

from __future__ import annotations

import numpy as np
import pytest

from rlsys.search.votes import Candidate, best, certainty, majority, until_sure, within


def drawn(*texts: str | None) -> list[Candidate]:
    """Return candidates of 10 tokens each, with falling values."""
    return [
        Candidate(text=text, right=text == "7", tokens=10 * number, value=-float(number))
        for number, text in enumerate(texts, start=1)
    ]


def test_the_most_frequent_answer_wins_and_of_equal_ones_the_first() -> None:
    assert majority(drawn("3", "7", "7")) == drawn("3", "7", "7")[1]
    assert majority(drawn("3", "7")) == drawn("3", "7")[0]


def test_draws_are_votes_and_chains_without_an_answer_have_none() -> None:
    heavy = Candidate(text="9", right=False, tokens=40, draws=3)
    assert majority([*drawn("7", "7", None, None, None), heavy]) == heavy
    assert majority(drawn(None)) is None
    assert majority([]) is None


def test_the_answer_with_the_largest_value_wins() -> None:
    later = Candidate(text="3", right=False, tokens=30, value=0.0)
    nothing = Candidate(text=None, right=False, tokens=40, value=1.0)
    assert best([*drawn("7", "7"), later, nothing]) == later
    assert best(drawn("3", "7")) == drawn("3", "7")[0]
    assert best([nothing]) is None


def test_a_budget_keeps_what_was_there_in_time() -> None:
    assert [each.tokens for each in within(drawn("1", "2", "3"), 20)] == [10, 20]
    assert within(drawn("1"), 9) == []


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([], 0.5),  # 1 coin with at most 0 heads
        ([1], 0.75),  # 2 coins with at most 1 head
        ([3], 0.9375),  # 4 coins with at most 3 heads
        ([2, 1], 11 / 16),  # 4 coins with at most 2 heads
        ([1, 2, 1], 11 / 16),  # the third answer does not count
        ([4, 4], 0.5),
    ],
)
def test_certainty_by_hand(votes: list[int], expected: float) -> None:
    assert certainty(votes) == pytest.approx(expected, abs=1e-15)


def test_certainty_is_that_of_the_beta_distribution() -> None:
    shares = np.random.default_rng(0).beta(5 + 1, 2 + 1, size=200_000)
    assert certainty([5, 2]) == pytest.approx((shares > 0.5).mean(), abs=0.005)


def test_drawing_ends_once_the_leader_is_sure() -> None:
    assert len(until_sure(drawn("7", "7", "7", "7", "7"), 0.9)) == 3
    # 4 votes to 1 have the certainty 57 / 64, and 5 to 1 have 120 / 128.
    assert len(until_sure(drawn("3", None, "7", "7", "7", "7", "7", "7"), 0.9)) == 7
    assert len(until_sure(drawn("3", "7"), 0.9)) == 2
    assert until_sure([], 0.9) == []
