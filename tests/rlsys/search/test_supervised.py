"""Supervised rows of the chain of a tree: by difficulty and in retrospect, of one node, of some types, with skips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tree_samples import END, PROMPT, CharCodec, answer, golden, ids, node, tree

from rlsys.config.search import ExtractConfig
from rlsys.search import extract
from rlsys.search.supervised import supervised_rows
from rlsys.trees import Tree

CODEC = CharCodec()


def rows(of: Tree, **settings: Any) -> list[tuple[str, str, str, str]]:
    """Return prefix, text, tokens and trained tokens of every row; ^ and $ stand for PROMPT and END."""

    def text(token_ids: np.ndarray) -> str:
        return "".join({PROMPT: "^", END: "$"}.get(token, chr(token)) for token in token_ids.tolist())

    found = supervised_rows(of, ExtractConfig(**settings), CODEC)
    return [(row.prefix, row.text, text(row.token_ids), text(row.token_ids[row.loss_mask])) for row in found]


def lengths(wrong: int) -> Tree:
    """Return a tree with right chains of 2, 5 and 10 tokens, drawn twice each, and some wrong ones."""
    right = [answer(0, letter * count, "ok", samples=2) for letter, count in (("a", 1), ("b", 4), ("c", 9))]
    return tree(*right, *([answer(0, "z", "wrong", samples=wrong)] if wrong else []))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        # Budget 2 + (1 - rate) 8. Rates 1, 6/8, 6/12, 6/24 and 6/600 give 2, 4, 6, 8 and 9.92.
        (0, "a"),
        (2, "bbbb"),
        (6, "bbbb"),
        (18, "c" * 9),
        (594, "c" * 9),
    ],
)
def test_the_budget_grows_with_the_difficulty(wrong: int, text: str) -> None:
    chain = extract.pick_chain(lengths(wrong), "by_difficulty", CODEC)
    assert chain is not None and chain.text == text


def test_of_two_as_close_to_the_budget_the_shorter_is_taken() -> None:
    # Lengths 2, 4, 6 and 4 of 8 right: budget 2 + 0.5 * 4 = 4. Lengths 2 and 4 alone: 3, as far from 2 as from 4.
    two = tree(answer(0, "a", "ok"), answer(0, "bbb", "ok"), answer(0, "z", "wrong", samples=2))
    chain = extract.pick_chain(two, "by_difficulty", CODEC)
    assert chain is not None and chain.text == "a"


def test_in_retrospect_the_first_thought_stays() -> None:
    # effffXx is the longest right chain (number 13); of those that begin with e, effffX (10) is shorter. aabbX (3),
    # the shortest of all, begins with another thought.
    chain = extract.pick_chain(golden(), "retrospective", CODEC)
    assert chain is not None and (chain.number, chain.text) == (10, "effffX")


def test_a_first_thought_of_equal_tokens_is_the_same() -> None:
    twice = tree(node(0, "a"), answer(1, "bbb", "ok"), node(0, "a"), answer(3, "c", "ok"), answer(0, "ab", "ok"))
    chain = extract.pick_chain(twice, "retrospective", CODEC)
    assert chain is not None and chain.text == "ac"  # the first thought of ab is the whole chain


def plan() -> Tree:
    return tree(
        node(0, "pp", "plan"),
        node(1, "tt"),
        node(2, "cc", "check"),
        answer(3, "X", "ok"),
        answer(2, "Y", "ok"),
    )


def test_a_whole_chain_is_one_row() -> None:
    assert rows(plan()) == [("", "ppttccX", "^qppttccX$", "ppttccX$")]


def test_every_node_is_a_row_after_its_context() -> None:
    assert rows(plan(), supervised_rows="node") == [
        ("", "pp", "^qpp", "pp"),
        ("pp", "tt", "^qpptt", "tt"),
        ("pptt", "cc", "^qppttcc", "cc"),
        ("ppttcc", "X", "^qppttccX$", "X$"),
    ]


def test_some_types_are_trained_and_the_others_are_context() -> None:
    assert rows(plan(), supervised_nodes=("plan",)) == [("", "ppttccX", "^qppttccX$", "pp")]
    assert rows(plan(), supervised_nodes=("check", "plan")) == [("", "ppttccX", "^qppttccX$", "ppcc")]
    assert rows(plan(), supervised_nodes=("plan",), supervised_rows="node") == [("", "pp", "^qpp", "pp")]
    assert rows(plan(), supervised_nodes=("reflection",)) == []


def test_a_type_is_skipped_where_another_right_chain_does_without_it() -> None:
    assert rows(plan(), skip=("check",)) == [("", "ppttX", "^qppttX$", "ppttX$")]  # as pptt, Y shows
    assert rows(plan(), skip=("plan", "thinking", "answer"))[0][1] == "ppttccX"  # every right chain has them
    wrong = tree(node(0, "tt"), node(1, "cc", "check"), answer(2, "X", "ok"), answer(1, "Y", "wrong"))
    assert rows(wrong, skip=("check",))[0][1] == "ttccX"


def test_a_token_across_the_edge_of_a_skipped_node_keeps_it() -> None:
    # The token < after tt opens cc; without cc, the chain would have tt<X.
    across = tree(
        node(0, "tt", token_ids=ids("tt<"), spill="<"),
        node(1, "<c", "check", token_ids=ids("c")),
        answer(2, "X", "ok"),
        answer(0, "Y", "ok"),
    )
    assert rows(across, skip=("check",)) == [("", "tt<cX", "^qtt<cX$", "tt<cX$")]
    # Here the token of cc opens the answer in the same way, so cc can go.
    both = tree(
        node(0, "tt", token_ids=ids("tt<"), spill="<"),
        node(1, "<c", "check", token_ids=ids("c<"), spill="<"),
        answer(2, "<X", "ok", token_ids=ids("X")),
        answer(0, "Y", "ok"),
    )
    assert rows(both, skip=("check",)) == [("", "tt<X", "^qtt<X$", "tt<X$")]
