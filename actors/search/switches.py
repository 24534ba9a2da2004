"""Switches between the thoughts of a right chain, after each of which another chain is drawn.

The longest right chain is revised from its beginning: after its first thought a chain is drawn anew, then after its
second, and so on. If a chain that keeps these thoughts is right and shorter, it takes the place of the longest one, and
the revision goes on with its next switch.
Source: Retro-Search, arXiv:2504.04383, which also forbids the thought that followed.
"""

from __future__ import annotations

from actors.search.expansion import Expander, Plan
from actors.search.stopping import is_correct
from actors.search.tree import GrowingTree, Node
from rlsys.config.search import RevisionConfig


class ThoughtSwitches:
    """The switches of one tree, of which each is used `draws` times.

    Args:
        expander: Planner of the tree's chains.
        config: Section `search.selection`.
    """

    def __init__(self, tree: GrowingTree, expander: Expander, config: RevisionConfig) -> None:
        self._tree, self._expander, self._config = tree, expander, config
        self._answers: list[Node] = []
        self._kept = 0
        self._drawn = 0
        self._revised: Node | None = None

    def next_chain(self, running: int) -> tuple[Node, Plan] | None:
        """Plan a chain after the next switch, or from the prompt; return the node that it follows.

        Args:
            running: Number of unfinished simulations.

        Returns:
            None if the first chains are unfinished or none of them is right, or if every switch was used.
        """
        root = self._tree.root
        if root.drawn_chains < self._config.chains:
            return self._draw(root)
        if self._revised is None:
            right = self._right()
            if running or not right:
                return None
            self._revised = max(right, key=lambda node: (_length(node), -node.number))
        if not self._kept or self._drawn == self._config.draws:
            if running:  # the chains after a switch decide where the next one is
                return None
            self._revise()
        path = self._revised.path()
        if self._tree.ends_turn(path[min(self._kept, len(path)) - 1].type):  # nothing but the reply follows
            self._kept += 1
        if self._kept >= len(path) - 1:  # an answer that is drawn again would be guessed
            return None
        self._drawn += 1
        return self._draw(path[self._kept - 1])

    def add(self, node: Node, first: int, rest: int) -> None:
        """Note a new node if it is an answer."""
        if node.terminal:
            self._answers.append(node)

    def _draw(self, node: Node) -> tuple[Node, Plan]:
        node.drawn_chains += 1
        plan = self._expander.chain(node)
        node.full = not plan.calls
        return node, plan

    def _revise(self) -> None:
        """Take the shortest right chain that keeps the thoughts before the switch, and go to the next switch."""
        assert self._revised is not None  # noqa: S101 - there is a chain to revise
        if self._kept:
            kept = self._revised.path()[: self._kept]
            alike = [node for node in self._right() if node.path()[: self._kept] == kept]
            self._revised = min(alike, key=lambda node: (_length(node), node.number))
        self._kept, self._drawn = self._kept + 1, 0

    def _right(self) -> list[Node]:
        """Return the right answers of chains that were not told of a wrong one."""
        judged = [node for node in self._answers if node.verdict is not None and is_correct(node.verdict)]
        return [node for node in judged if not any(step.backtrack for step in node.path())]


def _length(node: Node) -> int:
    """Return the number of tokens of the chain that ends at a node."""
    return sum(len(step.token_ids) for step in node.path())
