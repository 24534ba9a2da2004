"""Search against independent samples: Test@N and solved shares by tokens, by hand and as properties."""

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
    """Wrong after 10 tokens, right after 25, right after 25; 40 tokens in the end."""
    below = (
        node(0, "a"),
        answer(1, "x", "wrong", scored_tokens=10),
        answer(1, "y", "ok", scored_tokens=25),
        answer(1, "z", "ok", scored_tokens=25),
    )
    return tree(*below, tokens=40)


def early() -> Tree:
    """Right after 30 tokens, and nothing more."""
    return tree(answer(0, "y", "ok", scored_tokens=30), tokens=30)


def attempts(*pairs: tuple[bool, int], total: int | None = None) -> Attempts:
    right, tokens = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return Attempts(
        right=np.array(right, dtype=bool),
        tokens=np.array(tokens, dtype=np.int64),
        total=total if total is not None else max(tokens, default=0),
    )


SEARCH = [tree_attempts(late()), tree_attempts(early()), tree_attempts(FAILURE)]
# Right with the second sample after 20 tokens; never right in 36; right at once after 8.
SAMPLES = [
    attempts((False, 12), (True, 20)),
    attempts((False, 18), (False, 36)),
    attempts((True, 8), (False, 40)),
]


def test_answers_of_a_tree_come_in_the_order_of_scoring() -> None:
    found = tree_attempts(late())
    assert (found.right.tolist(), found.tokens.tolist(), found.total) == ([False, True, True], [10, 25, 25], 40)
    nodes = late().nodes
    places = (2, 0, 1)  # of the answers, by number of node
    scored = [replace(found, scored=place) for found, place in zip(nodes[2:], places, strict=True)]
    other = tree_attempts(replace(late(), nodes=(*nodes[:2], *scored)))
    assert other.right.tolist() == [True, True, False]


def test_every_token_of_the_samples_before_counts() -> None:
    wrong, right = trajectory(reward=0.0, outcome="wrong", length=2), trajectory(length=3)
    unpaid, timeout = trajectory(reward=0.0, length=1), trajectory(reward=0.0, outcome="timeout", length=5)
    found = sample_attempts([wrong, right, unpaid, timeout])
    assert found.right.tolist() == [False, True, False, False]
    assert (found.tokens.tolist(), found.total) == ([2, 5, 6, 11], 11)
    assert sample_attempts([]).total == 0


def test_solved_in_so_many_answers_by_hand() -> None:
    assert solved_in_answers(SEARCH, [1, 2, 3]).tolist() == [[False, True, True], [True] * 3, [False] * 3]
    found = compare_answers(SEARCH, SAMPLES, [1, 2])
    assert (found[1].search.mean, found[1].samples.mean) == pytest.approx((1 / 3, 1 / 3))
    assert (found[2].search.mean, found[2].samples.mean) == pytest.approx((2 / 3, 2 / 3))
    assert found[2].difference.mean == pytest.approx(0, abs=1e-15)  # 0, 1 and -1
    # The second tree has 1 answer, and it is right; the third has none.
    assert [row.ended for row in found.values()] == pytest.approx([1 / 3, 1 / 3])


def test_solved_in_so_many_tokens_by_hand() -> None:
    budgets = [8, 20, 24, 25, 30]
    found = compare_tokens(SEARCH, SAMPLES, budgets)
    assert [round(3 * row.search.mean) for row in found.values()] == [0, 0, 0, 1, 2]
    assert [round(3 * row.samples.mean) for row in found.values()] == [1, 2, 2, 2, 2]
    assert [round(3 * row.difference.mean) for row in found.values()] == [-1, -2, -2, -1, 0]
    assert [row.ended for row in found.values()] == pytest.approx([1 / 3] * 5)  # where there is no tree


def test_a_search_that_ended_counts_as_ended_only_while_it_is_unsolved() -> None:
    never = attempts((False, 10), total=15)
    found = compare_tokens([never, SEARCH[1]], SAMPLES[:2], [15, 16, 40])
    assert [row.ended for row in found.values()] == [0, 1 / 2, 1 / 2]
    found = compare_answers([never, SEARCH[1]], SAMPLES[:2], [1, 2])
    assert [row.ended for row in found.values()] == [0, 1 / 2]


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (40, [1, 2, 4, 8, 16, 32, 40])]
)
def test_numbers_of_answers(most: int, expected: list[int]) -> None:
    assert answer_counts(most) == expected


def test_budgets_end_where_a_tenth_of_the_searches_has_ended() -> None:
    # 21 trees of 100, 110, ..., 300 tokens: the tenth quantile is the third of them.
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
    found = [attempts(*row) for row in rows]
    by_answers, by_tokens = solved_in_answers(found, range(7)), solved_in_tokens(found, range(11))
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
