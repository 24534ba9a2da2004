"""Give the ancestors of wrong answers another child, as the pattern's table says."""

from __future__ import annotations

from collections import deque

from actors.search.tree import GrowingTree, Node


class Backtracking:
    """The backtracking children that wait to be requested: pairs of an ancestor and a node type."""

    def __init__(self, tree: GrowingTree) -> None:
        self._tree = tree
        self.queue: deque[tuple[Node, str]] = deque()

    def plan(self, answer: Node) -> None:
        """Queue one child for the nearest ancestor of a wrong answer that has a row in the table."""
        for node in answer.upwards():
            row = self._tree.pattern.after_wrong.get(node.type)
            if node is answer or row is None:
                continue
            type_name = next((name for name, limit in row.items() if node.backtracks[name] < limit), None)
            if type_name is not None and self._tree.fits(node, type_name):
                node.backtracks[type_name] += 1
                node.waiting += 1
                self.queue.append((node, type_name))
                self._tree.refresh(node)
            return

    def take(self) -> tuple[Node, str]:
        """Return the next ancestor and node type."""
        node, type_name = self.queue.popleft()
        node.waiting -= 1
        return node, type_name
