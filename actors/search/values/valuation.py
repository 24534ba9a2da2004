"""Values of the new nodes of one tree: which nodes are asked for, and what their values change.

A value stays with its node as `estimate`. A node whose value is too low ends its chain: with `search.value` of type
steps it is a wrong step, with the other types it is pruned. What follows in the same completion is dropped.
Source: Math-Shepherd, arXiv:2312.08935 (values of steps by rollouts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.search.expansion import Expander
from actors.search.reading import Line
from actors.search.requests import Thoughts, Values
from actors.search.tree import GrowingTree, NewNode, Node
from rlsys.config.search_values import AgreementValueConfig, RolloutsValueConfig, StepsValueConfig, ValueConfig
from rlsys.trees import Defect


@dataclass(frozen=True, slots=True)
class Unvalued:
    """The nodes of a line that were asked for.

    Attributes:
        first: Number of the first of them in the line.
    """

    line: Line
    first: int
    thoughts: Thoughts


class Valuation:
    """The values of one tree.

    Args:
        expander: Planner of the rollouts.
        rollouts: Number of rollouts from each new node; 0 for other types of values.
        least: A node with a smaller value is ended; None for no bound.
        defect: Defect of such a node.
    """

    def __init__(
        self, tree: GrowingTree, expander: Expander, *, rollouts: int, least: float | None, defect: Defect
    ) -> None:
        self._tree, self._expander = tree, expander
        self._rollouts, self._least, self._defect = rollouts, least, defect

    def ask(self, node: Node, lines: Sequence[Line], *, allowed: bool) -> list[Unvalued]:
        """Return the new nodes to ask for, and cut every line behind a node that was ended before.

        Args:
            node: The node that all lines follow.
            lines: They are changed in place.
            allowed: Whether anything may be asked. A search that has reached a limit asks nothing more.
        """
        unvalued: dict[object, Unvalued] = {}  # equal children of one expansion are one node
        for line in lines:
            above, first = node, 0
            while first < len(line) and (same := above.children_by_ids.get(line[first].node.key)):
                above, first = same, first + 1
                if same.defect:
                    self._cut(line, first)
            new = []
            for piece in line[first:]:
                if piece.is_reviewed or piece.node.defect or self._tree.is_terminal(piece.node):
                    break
                new.append(piece.node)
            if new and allowed:
                unvalued.setdefault((first, new[0].key), Unvalued(line, first, self._thoughts(above, new)))
        self._tree.counts["values"] += sum(len(each.thoughts.texts) for each in unvalued.values())
        return list(unvalued.values())

    def apply(self, unvalued: Sequence[Unvalued], answer: Values) -> None:
        """Give the nodes their values, and cut every line behind the first node whose value is too low."""
        for kind, count in answer.failed.items():
            self._tree.counts[f"value_{kind}"] += count
        for each, values in zip(unvalued, answer.values, strict=True):
            for number, value in enumerate(values, start=each.first):
                if value is None:
                    continue
                node = each.line[number].node
                node.estimate = value
                if self._least is not None and value < self._least:
                    node.defect = self._defect
                    self._cut(each.line, number + 1)
                    break

    def _thoughts(self, above: Node, new: Sequence[NewNode]) -> Thoughts:
        before = tuple(step.text for step in above.path())
        calls = []
        for node in new if self._rollouts else ():
            above = self._tree.draft(above, node)
            calls.append(tuple(self._expander.rollouts(above, self._rollouts)))
        return Thoughts(before=before, texts=tuple(node.text for node in new), rollouts=tuple(calls))

    def _cut(self, line: Line, length: int) -> None:
        """Drop the nodes of a line behind the first `length`, and count their generated tokens."""
        if dropped := sum(len(piece.node.logprobs) for piece in line[length:]):
            self._tree.counts["dropped_tokens"] += dropped
        del line[length:]


def valuation(tree: GrowingTree, expander: Expander, config: ValueConfig | None) -> Valuation | None:
    """Return the values of a tree for a section `search.value`, or None if no node is asked for."""
    if config is None or isinstance(config, AgreementValueConfig):
        return None
    if isinstance(config, StepsValueConfig):
        return Valuation(tree, expander, rollouts=0, least=1.0, defect="wrong_step")
    rollouts = config.count if isinstance(config, RolloutsValueConfig) else 0
    return Valuation(tree, expander, rollouts=rollouts, least=config.prune_below, defect="pruned")
