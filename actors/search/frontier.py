"""The frontier of a tree: the nodes at which a simulation may begin, of which the best is found without a scan.

Source: DeepSearch, arXiv:2509.25454, global frontier selection.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from actors.search.selection import Stats, value_or_parents
from actors.search.tree import GrowingTree, Node, Status
from rlsys.config.search import FrontierConfig, SelectionConfig


@dataclass(frozen=True, slots=True, order=True)
class _Entry:
    """A node of the heap. Nodes that wait for their expansion come last; `draw` decides between equal scores."""

    expanding: bool
    negative_score: float
    draw: float
    node_number: int


class Frontier:
    """The frontier of one tree.

    The tree names the nodes that have changed. Each of them, and each of its children without a visit, whose value is
    that of the parent, gets a new entry in a heap. An older entry of the same node is void.

    Args:
        rng: Decides between nodes of equal score.
    """

    def __init__(self, tree: GrowingTree, config: FrontierConfig, rng: random.Random) -> None:
        self._tree, self._config, self._rng = tree, config, rng
        self._heap: list[_Entry] = []
        self._newest: dict[Node, _Entry] = {}

    def best(self) -> Node | None:
        """Return the node with the best score at which a simulation can begin; None if there is no such node.

        A node that waits for its expansion is chosen only if there is no other.
        """
        changed = dict.fromkeys(self._tree.changed)  # in the order of the changes
        self._tree.changed.clear()
        changed |= dict.fromkeys(child for node in changed for child in node.children if not child.visits)
        for node in changed:
            self._push(node)
        while self._heap:
            node = self._tree.nodes[self._heap[0].node_number]
            if self._newest.get(node) is self._heap[0]:
                return node
            heapq.heappop(self._heap)
        return None

    def _push(self, node: Node) -> None:
        self._newest.pop(node, None)
        if node.status is not Status.OPEN or not self._can_begin_at(node):
            return
        deepest = self._tree.max_depth or max(1, self._tree.deepest)
        score = frontier_score(node, node.parent, node.depth, deepest, self._config)
        entry = _Entry(node.expanding, -score, self._rng.random(), node.number)
        self._newest[node] = entry
        heapq.heappush(self._heap, entry)

    def _can_begin_at(self, node: Node) -> bool:
        return node.expanding or self._tree.has_capacity(node) or (node.terminal and not node.defect)


def frontier(tree: GrowingTree, selection: SelectionConfig, rng: random.Random) -> Frontier | None:
    """Return the frontier of a tree, or None if its search does not select from it."""
    return Frontier(tree, selection, rng) if isinstance(selection, FrontierConfig) else None


def frontier_score(node: Stats, parent: Stats | None, depth: int, deepest: int, config: FrontierConfig) -> float:
    """Return the score of a node of the global frontier.

    score = w_v tanh(Q) + w_H H + w_d sqrt(depth / deepest), with H the mean negative log-probability of the node's
    drawn tokens in nats. Q is the value of the node, and that of its parent as long as the node has none. The
    paper always takes that of the parent, so a node that failed 20 times scores like its sibling that never did.

    Source: DeepSearch, arXiv:2509.25454, global frontier selection.
    """
    value = value_or_parents(node, parent) if parent is not None else 0.0
    entropy = -node.logprob / node.chosen_tokens if node.chosen_tokens else 0.0
    return (
        config.value_weight * math.tanh(value)
        + config.entropy_weight * entropy
        + config.depth_weight * math.sqrt(depth / max(1, deepest))
    )
