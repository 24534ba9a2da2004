"""Children that are requested because of a wrong answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from actors.search.selection import value_of
from actors.search.tree import GrowingTree, Node
from rlsys.config.search import SearchConfig


class Backtracking:
    """Queue of the children to request because of wrong answers.

    Attributes:
        queue: Parent and type of each child. `Node.waiting` of the parent counts it.
    """

    def __init__(self, tree: GrowingTree, config: SearchConfig) -> None:
        self._tree, self._most, self._rule = tree, config.max_backtracks, config.backtrack_to
        self._is_on = config.backtracking
        self.queue: deque[tuple[Node, str]] = deque()

    def plan(self, answer: Node) -> None:
        """Queue one child for a wrong answer, unless the config, the table or a limit forbids it.

        The parent of the child is an ancestor of the answer whose type has a row in `after_wrong`: the nearest one,
        whether or not it may get a child, or the best one that may.
        """
        if not self._is_on:
            return
        ancestors = [node for node in answer.upwards() if node is not answer and self._row(node)]
        if self._rule == "nearest":
            ancestors = ancestors[:1]
        children = [(node, name) for node in ancestors if (name := self._next_child(node))]
        if not children:
            return
        node, name = min(children, key=lambda child: self._rank(child[0]))  # the nearest of equal ones
        node.backtracks[name] += 1
        node.waiting += 1
        self.queue.append((node, name))
        self._tree.refresh(node)

    def _row(self, node: Node) -> Mapping[str, int]:
        return self._tree.pattern.after_wrong.get(node.type, {})

    def _next_child(self, node: Node) -> str | None:
        """Return the type of the next child that a node may get, or None."""
        name = next((name for name, limit in self._row(node).items() if node.backtracks[name] < limit), None)
        return name if name and self._tree.fits(node, name) and self._may_hold_another(node) else None

    def _rank(self, node: Node) -> float:
        if self._rule == "surprise":
            return min(node.logprobs, default=0.0)
        return (value_of(node) or 0.0) if self._rule == "value" else 0.0

    def _may_hold_another(self, node: Node) -> bool:
        """Return whether a chain through a node may get one more such child."""
        return self._most is None or sum(above.backtrack for above in node.upwards()) < self._most

    def take(self) -> tuple[Node, str]:
        """Remove the first child from the queue and return its parent and its type."""
        node, name = self.queue.popleft()
        node.waiting -= 1
        self._tree.counts["backtracks"] += 1
        return node, name
