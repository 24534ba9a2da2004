"""Children that are requested because of a wrong answer."""

from __future__ import annotations

from collections import deque

from actors.search.tree import GrowingTree, Node


class Backtracking:
    """Queue of the children to request because of wrong answers.

    Args:
        most: Largest number of such children in a chain; None for no limit.

    Attributes:
        queue: Parent and type of each child. `Node.waiting` of the parent counts it.
    """

    def __init__(self, tree: GrowingTree, most: int | None) -> None:
        self._tree, self._most = tree, most
        self.queue: deque[tuple[Node, str]] = deque()

    def plan(self, answer: Node) -> None:
        """Queue one child for a wrong answer, unless the table or a limit forbids it.

        The parent of the child is the nearest ancestor of the answer whose type has a row in `after_wrong`.
        """
        for node in answer.upwards():
            row = self._tree.pattern.after_wrong.get(node.type)
            if node is answer or row is None:
                continue
            name = next((name for name, limit in row.items() if node.backtracks[name] < limit), None)
            if name is not None and self._tree.fits(node, name) and self._may_hold_another(node):
                node.backtracks[name] += 1
                node.waiting += 1
                self.queue.append((node, name))
                self._tree.refresh(node)
            return

    def _may_hold_another(self, node: Node) -> bool:
        """Return whether a chain through a node may get one more such child."""
        return self._most is None or sum(above.backtrack for above in node.upwards()) < self._most

    def take(self) -> tuple[Node, str]:
        """Remove the first child from the queue and return its parent and its type."""
        node, name = self.queue.popleft()
        node.waiting -= 1
        self._tree.counts["backtracks"] += 1
        return node, name
