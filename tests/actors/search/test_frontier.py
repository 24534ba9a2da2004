"""The frontier without a scan, compared with a scan of all nodes."""

from __future__ import annotations

import pytest
from search_world import World, grow, search_config, shipped

from actors.search.frontier import Frontier, frontier_score
from actors.search.tree import GrowingTree, Node, Status
from rlsys.config.search import FrontierConfig

CONFIG = FrontierConfig(type="frontier", entropy_weight=0.1)


def scanned(tree: GrowingTree) -> dict[Node, tuple[bool, float]]:
    """Return the rank of every node at which a simulation can begin: the smallest is the best."""
    nodes = [
        node
        for node in tree.nodes
        if node.status is Status.OPEN
        and (node.expanding or tree.has_capacity(node) or (node.terminal and not node.defect))
    ]
    deepest = tree.max_depth or tree.deepest
    return {node: (node.expanding, -frontier_score(node, node.parent, node.depth, deepest, CONFIG)) for node in nodes}


@pytest.mark.parametrize("expansion", ["node", "chain"])
def test_the_best_node_is_that_of_a_scan(expansion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    best, compared = Frontier.best, 0

    def checked(frontier: Frontier) -> Node | None:
        nonlocal compared
        node, ranks = best(frontier), scanned(frontier._tree)
        assert node is not None
        assert ranks[node] == pytest.approx(min(ranks.values()))
        compared += len(ranks) > 1
        return node

    monkeypatch.setattr(Frontier, "best", checked)
    for seed in range(5):
        world = World(pattern=shipped("letter_count"))
        stop = {"simulations": 60, "correct": []}
        config = search_config(expansion=expansion, selection=CONFIG, parallel_simulations=4, stop=stop)
        grow(world, config, seed=seed)
    assert compared > 50
