"""Revision of the longest right chain: another chain is drawn after each of its thoughts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from search_world import Grown, grow, scripted, search_config

from rlsys.config.search import SearchConfig
from rlsys.trees import Tree

CHILDREN = {"start": {"thinking": 9}, "thinking": {"thinking": 9, "answer": 9}}


def chain(*thoughts: str, answer: str = "1") -> str:
    return "".join(f"<thinking>{thought}</thinking>" for thought in thoughts) + f"<answer>{answer}</answer>"


def grown(proposals: dict[str, Any], *, draws: int = 1, **fields: Any) -> Grown:
    selection = {"type": "revision", "chains": 2, "draws": draws}
    config = search_config(selection=selection, expansion="chain", backtracking=False, **fields)
    return grow(scripted(CHILDREN, proposals), config)


def texts(tree: Tree) -> list[str]:
    return [tree.completion(number) for number in tree.answers()]


A, AB, ABC = ("".join(f"<thinking>{thought}</thinking>" for thought in thoughts) for thoughts in ("a", "ab", "abc"))


def test_a_shorter_right_chain_takes_the_place_of_the_longest() -> None:
    # Of the first two chains, abcd is revised. After a, the chain d is right and shorter, so the chain is now ad, with
    # one more thought that could be followed by another answer alone: nothing is left to draw.
    tree = grown({"": [chain("a", "b", "c", "d"), chain("z")], A: [chain("d")]}).tree
    assert texts(tree) == [chain("a", "b", "c", "d"), chain("z"), chain("a", "d")]
    assert (tree.simulations, tree.stop) == (3, "exhausted")


def test_a_wrong_or_longer_chain_changes_nothing() -> None:
    # After a the chain is wrong, after ab longer, and after abc it is right and shorter.
    proposals = {
        "": [chain("a", "b", "c", "ddd", "e"), chain("z", answer="0")],
        A: [chain("x", answer="0")],
        AB: [chain("cc", "dddd", "ee")],
        ABC: [chain("d")],
    }
    tree = grown(proposals).tree
    assert texts(tree)[2:] == [
        chain("a", "x", answer="0"),
        chain("a", "b", "cc", "dddd", "ee"),
        chain("a", "b", "c", "d"),
    ]
    assert tree.stop == "exhausted"


def test_every_switch_has_its_draws_and_the_shortest_wins() -> None:
    proposals = {"": [chain("a", "b", "c"), chain("z")], A: [chain("y", "yy"), chain("x")]}
    tree = grown(proposals, draws=2, parallel_simulations=4).tree
    assert texts(tree) == [chain("a", "b", "c"), chain("z"), chain("a", "y", "yy"), chain("a", "x")]


def test_without_a_right_chain_nothing_is_revised() -> None:
    tree = grown({"": [chain("a", "b", answer="0"), chain("z", answer="0")]}).tree
    assert (tree.simulations, tree.stop) == (2, "exhausted")


def test_the_limits_of_the_search_hold() -> None:
    tree = grown({"": [chain("a", "b", "c"), chain("z")]}, stop={"simulations": 2}).tree
    assert (len(texts(tree)), tree.stop) == (2, "simulations")


def test_node_expansion_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"selection \{type: revision\} draws whole chains: set expansion to chain"
    ):
        SearchConfig(expansion="node", selection={"type": "revision"})
