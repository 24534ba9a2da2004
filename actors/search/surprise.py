"""Places in the chains of a tree from which another chain may be drawn: the most surprising token comes first.

A model that is wrong was often unsure at one token. So a new chain begins where the model was least sure, and all
tokens before it are kept. The score of a token is `-log p (1 - Q)`, with the log-probability p of the token in nats and
the value Q of its node: what has led to right answers is seldom drawn again.
Source: EPTree, TreeRL, arXiv:2506.11902, which takes tokens of the largest entropy.
"""

from __future__ import annotations

from actors.search.expansion import Expander, Plan
from actors.search.selection import value_of
from actors.search.tree import GrowingTree, Node
from rlsys.config.search import SurpriseConfig


class SurprisingPlaces:
    """The places of one tree, of which each is used once.

    Args:
        expander: Planner of the tree's chains.
        config: Section `search.selection`.
    """

    def __init__(self, tree: GrowingTree, expander: Expander, config: SurpriseConfig) -> None:
        self._tree, self._expander, self._config = tree, expander, config
        # Log-probability and number of the generated tokens that were not used, by node; the most surprising one last.
        self._places: dict[Node, list[tuple[float, int]]] = {}
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
        places = []
        for number, logprob in enumerate(node.logprobs[first:], start=first):
            # A sibling may begin with the same tokens.
            place = (node.parent, tuple(node.token_ids[: node.forced + number + 1]))
            if place not in self._known:
                self._known.add(place)
                places.append((logprob, number))
        if places:
            self._places[node] = sorted(places, reverse=True)

    def take(self) -> tuple[Node, int] | None:
        """Remove the best place; return its node and the number of the node's tokens before it, or None.

        Values change between the calls, so all nodes are compared. The places of one node have the same value.
        """
        if not self._places:
            return None
        node = max(self._places, key=lambda node: _score(node, self._places[node][-1][0]))  # the oldest of equal ones
        _, token = self._places[node].pop()
        if not self._places[node]:
            del self._places[node]
        return node, node.forced + token


def _score(node: Node, logprob: float) -> float:
    return -logprob * (1 - (value_of(node) or 0.0))
