"""Places in the chains of a tree from which another chain may be drawn: the most surprising token comes first.

A model that is wrong was often unsure at one token. So a new chain begins where the model was least sure, and all
tokens before it are kept. The score of a token is `-log p (1 - Q)`, with the log-probability p of the token in nats and
the mean reward Q of the chains through its node: what has led to right answers is seldom drawn again.
Source: EPTree, TreeRL, arXiv:2506.11902, which takes tokens of the largest entropy.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

from actors.search.expansion import Expander, Plan
from actors.search.tree import GrowingTree, Node
from rlsys.config.search import SurpriseConfig


@dataclass(frozen=True, slots=True, order=True)
class _Entry:
    """A place of the heap. `number` keeps the order of equal scores."""

    negative_score: float
    number: int
    node: Node
    token: int


class SurprisingPlaces:
    """The places of one tree, of which each is used once.

    Args:
        expander: Planner of the tree's chains.
        config: Section `search.selection`.
    """

    def __init__(self, tree: GrowingTree, expander: Expander, config: SurpriseConfig) -> None:
        self._tree, self._expander, self._config = tree, expander, config
        self._heap: list[_Entry] = []
        self._numbers = itertools.count()
        self._known: set[tuple[Node | None, tuple[int, ...]]] = set()

    def next_chain(self, running: int) -> tuple[Node, Plan] | None:
        """Plan a chain at the best place, or from the prompt; return the node that it follows.

        Args:
            running: Number of unfinished simulations, which may bring new places.

        Returns:
            None if there is no place now. The prompt is used again only if nothing is running.
        """
        root = self._tree.root
        is_first = root.drawn_chains < self._config.chains
        place = None if is_first else self.take()
        if place is not None:
            node, kept = place
            assert node.parent is not None  # noqa: S101 - places are tokens of nodes
            node.parent.drawn_chains += 1
            return node.parent, self._expander.redraw(node, kept if self._config.unit == "token" else 0)
        if not self._tree.has_capacity(root) or (running and not is_first):
            return None
        root.drawn_chains += 1
        plan = self._expander.chain(root)
        root.full = not plan.calls
        return root, plan

    def add(self, node: Node, first: int) -> None:
        """Add the generated tokens of a new node, from the generated token `first` on."""
        if node.terminal:  # a reward belongs to the chain, and a redrawn answer would guess at it
            return
        for number, logprob in enumerate(node.logprobs[first:], start=first):
            # A sibling may begin with the same tokens.
            place = (node.parent, tuple(node.token_ids[: node.forced + number + 1]))
            if place not in self._known:
                self._known.add(place)
                self._push(node, number, logprob)

    def take(self) -> tuple[Node, int] | None:
        """Remove the best place; return its node and the number of the node's tokens before it, or None."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            score = _score(entry.node, entry.node.logprobs[entry.token])
            # Scores change with the values. A score that has fallen is compared again with the others.
            if self._heap and score < -self._heap[0].negative_score:
                self._push(entry.node, entry.token, entry.node.logprobs[entry.token])
                continue
            return entry.node, entry.node.forced + entry.token
        return None

    def _push(self, node: Node, token: int, logprob: float) -> None:
        heapq.heappush(self._heap, _Entry(-_score(node, logprob), next(self._numbers), node, token))


def _score(node: Node, logprob: float) -> float:
    value = node.total / node.visits if node.visits else 0.0
    return -logprob * (1 - value)
