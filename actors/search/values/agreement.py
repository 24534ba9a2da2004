"""Rewards by agreement: an answer is worth the share of the tree's answers that are the same.

They need no reference. A share changes with every new answer, so all sums of rewards are computed again then.
Source: self-consistency, arXiv:2203.11171; as a reward, TTRL, arXiv:2504.16084.
"""

from __future__ import annotations

from collections import Counter

from actors.search.tree import GrowingTree, Node
from rlsys.config.search_values import AgreementValueConfig, ValueConfig
from rlsys.trees import answer_text


class Agreement:
    """The answers of one tree and their shares."""

    def __init__(self, tree: GrowingTree) -> None:
        self._tree = tree
        self._ends: Counter[Node] = Counter()  # simulations that ended at each answer

    def back_up(self, answer: Node) -> None:
        """Count a simulation that ended at an answer, and compute the rewards of all answers again.

        The reward of an answer is the number of draws of all answers with the same text over that of all answers.
        """
        self._tree.back_up(answer, 0.0)
        self._ends[answer] += 1
        draws = Counter[str]()
        for node in self._ends:
            draws[answer_text(node.text)] += node.samples
        for node in self._tree.nodes:
            node.total = 0.0
            self._tree.changed[node] = None
        for node, ends in self._ends.items():
            reward = ends * draws[answer_text(node.text)] / draws.total()
            for above in node.upwards():
                above.total += reward


def agreement(tree: GrowingTree, config: ValueConfig | None) -> Agreement | None:
    """Return the agreement of a tree, or None if its verdicts give the rewards."""
    return Agreement(tree) if isinstance(config, AgreementValueConfig) else None
