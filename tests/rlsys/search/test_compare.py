"""Comparison of search and samples: Test@N and solved shares by tokens, by hand and as properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes import trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_samples import answer, node, tree

from rlsys.search.compare import (
    Attempts,
    answer_counts,
    compare_answers,
    compare_tokens,
    sample_attempts,
    solved_in_answers,
    solved_in_tokens,
    token_budgets,
    tree_attempts,
)
from rlsys.trees import Tree, TreeFailure

FAILURE = TreeFailure(prompt_id="p", question="q", answer="1", reason="too long")


def late() -> Tree:
    """Return a tree of 40 tokens: wrong after 10 tokens, and twice right after 25 tokens."""
    below = (
        node(0, "a"),
        answer(1, "x", "wrong", scored_tokens=10),
        answer(1, "y", "ok", scored_tokens=25),
        answer(1, "z", "ok", scored_tokens=25),
    )
    return tree(*below, tokens=40)


def early() -> Tree:
    """Return a tree of 30 tokens that ends with a right answer."""
    return tree(answer(0, "y", "ok", scored_tokens=30), tokens=30)


def attempts(*pairs: tuple[bool, int], total: int | None = None) -> Attempts:
    right, tokens = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return Attempts(
        right=np.array(right, dtype=bool),
        tokens=np.array(tokens, dtype=np.int64),
        total=total if total is not None else max(tokens, default=0),
    )


SEARCH = [tree_attempts(late()), tree_attempts(early()), tree_attempts(FAILURE)]
# The second sample is right after 20 tokens; no sample is right in 36 tokens; the first sample is right after 8 tokens.
SAMPLES = [
    attempts((False, 12), (True, 20)),
    attempts((False, 18), (False, 36)),
    attempts((True, 8), (False, 40)),
]


def test_answers_of_a_tree_come_in_the_order_of_scoring() -> None:
    attempt = tree_attempts(late())
    assert (attempt.right.tolist(), attempt.tokens.tolist(), attempt.total) == ([False, True, True], [10, 25, 25], 40)
    nodes = late().nodes
    places = (2, 0, 1)  # new places of the answers, in the order of the nodes
    scored = [replace(node, scored=place) for node, place in zip(nodes[2:], places, strict=True)]
    other = tree_attempts(replace(late(), nodes=(*nodes[:2], *scored)))
    assert other.right.tolist() == [True, True, False]


def test_every_token_of_the_samples_before_counts() -> None:
    wrong, right = trajectory(reward=0.0, outcome="wrong", length=2), trajectory(length=3)
    unrewarded, timeout = trajectory(reward=0.0, length=1), trajectory(reward=0.0, outcome="timeout", length=5)
    attempt = sample_attempts([wrong, right, unrewarded, timeout])
    assert attempt.right.tolist() == [False, True, False, False]
    assert (attempt.tokens.tolist(), attempt.total) == ([2, 5, 6, 11], 11)
    assert sample_attempts([]).total == 0


def test_solved_in_so_many_answers_by_hand() -> None:
    assert solved_in_answers(SEARCH, [1, 2, 3]).tolist() == [[False, True, True], [True] * 3, [False] * 3]
    rows = compare_answers(SEARCH, SAMPLES, [1, 2])
    assert (rows[1].search.mean, rows[1].samples.mean) == pytest.approx((1 / 3, 1 / 3))
    assert (rows[2].search.mean, rows[2].samples.mean) == pytest.approx((2 / 3, 2 / 3))
    assert rows[2].difference.mean == pytest.approx(0, abs=1e-15)  # the mean of 0, 1 and -1
    # The second tree has one answer, which is right. The third tree has none.
    assert [row.ended for row in rows.values()] == pytest.approx([1 / 3, 1 / 3])


def test_solved_in_so_many_tokens_by_hand() -> None:
    budgets = [8, 20, 24, 25, 30]
    rows = compare_tokens(SEARCH, SAMPLES, budgets).values()
    assert [round(3 * row.search.mean) for row in rows] == [0, 0, 0, 1, 2]
    assert [round(3 * row.samples.mean) for row in rows] == [1, 2, 2, 2, 2]
    assert [round(3 * row.difference.mean) for row in rows] == [-1, -2, -2, -1, 0]
    assert [row.ended for row in rows] == pytest.approx([1 / 3] * 5)  # the prompt without a tree


def test_a_search_that_ended_counts_as_ended_only_while_it_is_unsolved() -> None:
    never = attempts((False, 10), total=15)
    by_tokens = compare_tokens([never, SEARCH[1]], SAMPLES[:2], [15, 16, 40])
    assert [row.ended for row in by_tokens.values()] == [0, 1 / 2, 1 / 2]
    by_answers = compare_answers([never, SEARCH[1]], SAMPLES[:2], [1, 2])
    assert [row.ended for row in by_answers.values()] == [0, 1 / 2]


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (40, [1, 2, 4, 8, 16, 32, 40])]
)
def test_numbers_of_answers(most: int, expected: list[int]) -> None:
    assert answer_counts(most) == expected


def test_budgets_end_where_a_tenth_of_the_searches_has_ended() -> None:
    # 21 trees have 100, 110, ..., 300 tokens. The 10 % quantile is the third value, 120.
    assert token_budgets([attempts(total=100 + 10 * i) for i in range(21)]) == [15, 30, 60, 120]
    assert token_budgets([attempts(total=2)]) == [1, 2]


ROWS = st.lists(
    st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=5).map(
        lambda row: sorted(row, key=lambda at: at[1])
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS)
def test_solved_means_that_one_is_right_so_far(rows: list[list[tuple[bool, int]]]) -> None:
    of_rows = [attempts(*row) for row in rows]
    by_answers, by_tokens = solved_in_answers(of_rows, range(7)), solved_in_tokens(of_rows, range(11))
    for i, row in enumerate(rows):
        assert by_answers[i].tolist() == [any(right for right, _ in row[:count]) for count in range(7)]
        assert by_tokens[i].tolist() == [any(right and at <= budget for right, at in row) for budget in range(11)]


@settings(deadline=None, max_examples=30)
@given(first=ROWS, second=ROWS)
def test_a_comparison_turned_round_changes_its_sign(
    first: list[list[tuple[bool, int]]], second: list[list[tuple[bool, int]]]
) -> None:
    count = min(len(first), len(second))
    one, two = ([attempts(*row) for row in rows[:count]] for rows in (first, second))
    for forwards, backwards in zip(
        compare_tokens(one, two, [4]).values(), compare_tokens(two, one, [4]).values(), strict=True
    ):
        assert forwards.difference.mean == pytest.approx(forwards.search.mean - forwards.samples.mean, abs=1e-12)
        assert forwards.difference.low == pytest.approx(-backwards.difference.high, abs=1e-12)
        assert forwards.difference.low <= forwards.difference.mean <= forwards.difference.high
