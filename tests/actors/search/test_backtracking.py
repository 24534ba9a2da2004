"""The ancestor of a wrong answer that gets a child because of it."""

from __future__ import annotations

import pytest
from search_world import BARE, table

from actors.search.backtracking import Backtracking
from actors.search.tree import GrowingTree, NewNode, Node
from rlsys.config.search import SearchConfig

TABLE = table(
    {"start": {"thinking": 2}, "thinking": {"thinking": 1, "answer": 1}, "reflection": {"answer": 1}},
    {"thinking": {"reflection": 1}},
    {"reflection": BARE["reflection"]},
)


def add(tree: GrowingTree, parent: Node, name: str, logprobs: tuple[float, ...]) -> Node:
    ids = range(len(tree.nodes) * 10, len(tree.nodes) * 10 + len(logprobs))
    return tree.add(
        parent,
        NewNode(
            type=name,
            text=name,
            token_ids=ids,
            forced=0,
            logprobs=logprobs,
            spill="",
            writer="policy",
            finish_reason="stop",
            versions=(),
            defect=None,
        ),
    )


def planned(rule: str, *, used: int | None = None) -> int | None:
    """Return the place, in a chain of three thoughts with a wrong answer, of the thought that gets the child.

    The second thought has the most surprising token, and the first has the lowest mean reward.
    """
    tree = GrowingTree(TABLE, chains=True, max_depth=9)
    config = SearchConfig(expansion="chain", backtrack_to=rule)
    chain = [tree.root]
    for logprobs in ((-1.0, -2.0), (-0.1, -3.0), (-1.5, -2.5)):
        chain.append(add(tree, chain[-1], "thinking", logprobs))
    answer = add(tree, chain[-1], "answer", (-9.0,))
    for node, total in zip(chain[1:], (0.5, 1.0, 2.0), strict=True):
        node.visits, node.total = 4, total
    if used is not None:
        chain[used].backtracks["reflection"] = 1
    backtracking = Backtracking(tree, config)
    backtracking.plan(answer)
    return next((chain.index(node) for node, _ in backtracking.queue), None)


@pytest.mark.parametrize(("rule", "place"), [("nearest", 3), ("surprise", 2), ("value", 1)])
def test_the_rule_chooses_the_ancestor(rule: str, place: int) -> None:
    assert planned(rule) == place


@pytest.mark.parametrize(("rule", "place"), [("surprise", 3), ("value", 1)])
def test_an_ancestor_that_may_get_no_further_child_is_passed_over(rule: str, place: int) -> None:
    assert planned(rule, used=2) == place


def test_the_nearest_ancestor_is_not_replaced_by_a_farther_one() -> None:
    assert planned("nearest", used=3) is None
