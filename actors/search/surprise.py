"""Places in the chains of a tree from which another chain may be drawn: the most surprising token comes first.

A model that is wrong was often unsure at one token. So a new chain begins where the model was least sure, and all
tokens before it are kept. If one of those was more surprising still, the error may be there. So the score of a token is
its excess, d = s - b: its surprise s = -log p in nats, minus the largest surprise b of a token before it in the chain.
A positive excess counts as d (1 - Q) / n, with the value Q of the node, because what led to right answers is seldom
drawn again, and the number n of tokens that the chain had from the place on, because a new chain costs about as many.
Without a positive excess, a whole chain is drawn.
Source: EPTree, TreeRL, arXiv:2506.11902, which takes tokens of the largest entropy. The excess is ours.
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
        # Score and negative number of the generated tokens that were not used, by node; the best one last.
        self._places: dict[Node, list[tuple[float, int]]] = {}
        # Numbers of the beginnings of all chains, by that of the beginning without its last token, and this token.
        # Nodes with other forced tokens may hold the same beginning.
        self._numbers: dict[tuple[int, int], int] = {}
        self._number_of: dict[Node, int] = {}  # of the chain to the end of a node
        self._surprises: dict[int, float] = {}  # of the last token of a beginning
        self._largest: dict[Node, float] = {}  # of all tokens of a chain up to the end of a node

    def next_chain(self, running: int) -> tuple[Node, Plan] | None:
        """Plan a chain at the best place, or from the prompt; return the node that it follows.

        Args:
            running: Number of unfinished simulations, which may bring new places.

        Returns:
            None if there is no place now. The prompt is used again once nothing is running.
        """
        root = self._tree.root
        is_first = root.drawn_chains < self._config.chains
        place = None if is_first else self.take()
        if place is not None:
            node, kept = place
            assert node.parent is not None  # noqa: S101 - places are tokens of nodes
            node.parent.drawn_chains += 1
            return node.parent, self._expander.redraw(node, kept if self._config.unit == "token" else 0)
        if root.full or (running and not is_first):
            return None
        root.drawn_chains += 1
        plan = self._expander.chain(root)
        root.full = not plan.calls
        return root, plan

    def add(self, node: Node, first: int, rest: int) -> None:
        """Add the generated tokens of a new node, from the generated token `first` on; `rest` tokens came after it."""
        if node.terminal:  # a reward belongs to the chain, and a redrawn answer would guess at it
            return
        assert node.parent is not None  # noqa: S101 - the prompt is not generated
        places, numbers = [], self._beginnings(node)
        kept = (self._surprises.get(number, 0.0) for number in numbers[: node.forced])
        # Nodes that no model wrote were not added.
        before = next((self._largest[above] for above in node.parent.upwards() if above in self._largest), 0.0)
        largest = max(before, *kept, 0.0)
        for place, (number, logprob) in enumerate(zip(numbers[node.forced :], node.logprobs, strict=True)):
            if number not in self._surprises:  # a sibling may begin with the same tokens
                self._surprises[number] = -logprob
                if place >= first:
                    begin = place if self._config.unit == "token" else 0
                    excess, cost = -logprob - largest, len(node.logprobs) - begin + rest
                    places.append((excess / cost if excess > 0 else excess, -place))
            largest = max(largest, -logprob)
        self._largest[node] = largest
        if places:
            self._places[node] = sorted(places)

    def _beginnings(self, node: Node) -> list[int]:
        """Return the numbers of the chain up to every token of a node."""
        assert node.parent is not None  # noqa: S101 - the prompt has no tokens of a chain
        number, numbers = self._end(node.parent), []
        for token in node.token_ids:
            number = self._numbers.setdefault((number, token), len(self._numbers) + 1)
            numbers.append(number)
        self._number_of[node] = number
        return numbers

    def _end(self, node: Node) -> int:
        """Return the number of the chain up to the end of a node; 0 at the prompt."""
        if node.parent is None:
            return 0
        if node not in self._number_of:
            self._beginnings(node)
        return self._number_of[node]

    def take(self) -> tuple[Node, int] | None:
        """Remove the best place; return its node and the number of the node's tokens before it.

        Values change between the calls, so all nodes are compared. The places of one node have the same value.

        Returns:
            None without a place, and without one of positive excess as long as the prompt has room for a chain.
        """
        if not self._places:
            return None
        node = max(self._places, key=lambda node: _score(node, self._places[node][-1][0]))  # the oldest of equal ones
        if self._places[node][-1][0] <= 0 and not self._tree.root.full:
            return None
        _, negative_number = self._places[node].pop()
        if not self._places[node]:
            del self._places[node]
        return node, node.forced - negative_number


def _score(node: Node, place: float) -> float:
    return place * (1 - (value_of(node) or 0.0)) if place > 0 else place
