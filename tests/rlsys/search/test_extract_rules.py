"""Extraction from trees in which a chain goes on after a wrong answer, and the rules of pairs. By hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tree_samples import CharCodec, answer, node, tree

from rlsys.config.search import ExtractConfig
from rlsys.search import extract
from rlsys.search.outline import verdict_text
from rlsys.trees import Tree
from rlsys.types import Verdict

CODEC = CharCodec()
WRONG = Verdict(outcome="wrong", reward=0.0, answered=False)


def hinted() -> Tree:
    """Return a tree with right chains of 0, 1 and 2 nodes after a wrong answer."""
    return tree(
        node(0, "a"),
        answer(1, "b", "wrong"),
        node(1, "cc", "reflection", backtrack=True),
        answer(3, "d", "wrong"),
        node(3, "ee", "reflection", backtrack=True),
        answer(5, "f", "ok"),
        answer(3, "g", "ok"),
        answer(1, "h", "ok"),
    )


@pytest.mark.parametrize(("most", "number"), [(None, 6), (2, 6), (1, 7), (0, 8)])
def test_chains_with_many_hints_are_left_out(most: int | None, number: int) -> None:
    chain = extract.pick_chain(hinted(), "longest", CODEC, most)
    assert chain is not None and chain.number == number
    config = ExtractConfig(chosen="longest", max_backtracks=most)
    (pair,) = extract.preference_pairs(hinted(), config, CODEC)
    assert chr(pair.chosen_ids[-2]) == hinted().nodes[number].text


def test_no_chain_is_left() -> None:
    only = tree(node(0, "a"), answer(1, "b", "wrong"), node(1, "c", backtrack=True), answer(3, "d", "ok"))
    assert extract.pick_chain(only, "shortest", CODEC, 0) is None
    assert extract.preference_pairs(only, ExtractConfig(max_backtracks=0), CODEC) == []


def test_values_of_steps_leave_out_what_followed_a_hint() -> None:
    # Of the five chains through node 1, two had no hint: b is wrong and h is right.
    assert hinted().nodes[1].visits == 5
    records = extract.unhinted(hinted())
    assert records[1] == (2, 1.0) and records[0] == (2, 1.0)
    assert records[3] == (2, 1.0), "the hint above a node stays: d and g"
    assert records[5] == (1, 1.0)
    values = {step.text: (step.value, step.visits) for step in extract.step_values(hinted(), CODEC)}
    assert values["a"] == (0.5, 2) and values["cc"] == (0.5, 2) and values["ee"] == (1.0, 1)


def test_a_node_with_hinted_chains_alone_is_no_step() -> None:
    of = tree(node(0, "a"), node(1, "b", backtrack=True), answer(2, "c", "ok"), answer(0, "d", "wrong"))
    assert sorted(step.text for step in extract.step_values(of, CODEC)) == ["b", "c", "d"]  # not a


def sides(**rules: Any) -> list[tuple[str, str]]:
    """Return the pairs of a tree with one right chain, axy, and three wrong ones."""
    of = tree(
        node(0, "a"),
        node(1, "x"),
        answer(2, "y", "ok"),
        answer(2, "z", "wrong"),
        answer(1, "v", "wrong"),
        node(1, "w"),
        answer(6, "u", "wrong"),
    )
    pairs = extract.preferred_chains(of, ExtractConfig(pairs_per_tree=9, **rules), CODEC)
    return [(chosen.text, rejected.text) for chosen, rejected in pairs]


def test_pairs_by_prefix() -> None:
    shortest = sides()
    assert shortest == [("axy", "awu"), ("axy", "av"), ("axy", "axz")]
    assert sides(pairs="longest_prefix") == [shortest[2], *shortest[:2]]


def test_pairs_of_one_type() -> None:
    # The answer av begins where axy goes on with a thought.
    assert sides(pairs="same_type") == [("axy", "awu"), ("axy", "axz")]


def test_a_failed_chain_is_no_row_and_at_most_the_worse_side_of_a_pair_of_steps() -> None:
    """A reward function has paid more for it than for the answers."""
    failed = answer(0, "bad", "ok", 3.0, defect="malformed")
    of = tree(failed, node(0, "a"), answer(2, "c", "ok"), answer(2, "d", "wrong"))
    assert of.solved and [of.nodes[number].text for number in of.answers()] == ["c", "d"]
    [pair] = extract.preferred_chains(of, ExtractConfig(), CODEC)
    assert [side.number for side in pair] == [3, 4]
    config = ExtractConfig(step_min_visits=1)
    assert [(b.text, w.text) for b, w in extract.preferred_steps(of, config, CODEC)] == [("c", "d")]
    worse = tree(replace(failed, verdict=WRONG), node(0, "a"), answer(2, "c", "ok"))
    assert [(b.text, w.text) for b, w in extract.preferred_steps(worse, config, CODEC)] == [("a", "bad")]
    assert [verdict_text(each.nodes[1]) for each in (of, worse)] == ["right, reward 3", "wrong, reward 0"]
