"""Selection that goes down no path: whole chains that begin at places of earlier chains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from actors.search.expansion import Expander, Plan
from actors.search.reading import ChainPiece
from actors.search.simulations import Simulation
from actors.search.surprise import SurprisingPlaces
from actors.search.switches import ThoughtSwitches
from actors.search.tree import GrowingTree, Node
from rlsys.config.patterns import Pattern
from rlsys.config.search import RevisionConfig, SearchConfig, SelectionConfig, SurpriseConfig


class ChainPlaces(Protocol):
    """The places of one tree after which chains are drawn."""

    def next_chain(self, running: int) -> tuple[Node, Plan] | None:
        """Plan the next chain; return the node that it follows, or None if there is no place now."""
        ...

    def add(self, node: Node, first: int, rest: int) -> None:
        """Take a new node, whose generated tokens are new from the number `first` on; `rest` tokens came after it."""
        ...


def growing_tree(pattern: Pattern, config: SearchConfig) -> GrowingTree:
    """Return the tree of a search, with the prompt alone."""
    by_rows = not isinstance(config.selection, SurpriseConfig | RevisionConfig)
    return GrowingTree(pattern, chains=config.expansion == "chain", max_depth=config.max_depth, by_rows=by_rows)


def chain_places(tree: GrowingTree, expander: Expander, selection: SelectionConfig) -> ChainPlaces | None:
    """Return the places of a tree, or None if its search goes down paths."""
    if isinstance(selection, SurpriseConfig):
        return SurprisingPlaces(tree, expander, selection)
    return ThoughtSwitches(tree, expander, selection) if isinstance(selection, RevisionConfig) else None


def add_chain(
    tree: GrowingTree,
    simulation: Simulation,
    pieces: Sequence[ChainPiece],
    places: ChainPlaces | None,
    *,
    redrawn: bool,
) -> str | None:
    """Add the nodes of a chain to the tree, and enter them.

    Args:
        places: Gets the new nodes; None if the search goes down paths.
        redrawn: Whether the first token of the chain stands at a place that was used.

    Returns:
        The type of the node that the reviewer must write next; None if there is none.
    """
    begin, reviewed_type = simulation.node, None
    rest = sum(len(piece.node.token_ids) for piece in pieces)
    for piece in pieces:
        node = simulation.node
        rest -= len(piece.node.token_ids)
        if node is not begin:  # the chain is one draw from each node that it passes
            node.drawn_chains += 1
        if piece.is_reviewed:
            reviewed_type = piece.node.type
            break
        child = tree.add(node, piece.node)
        if places is not None and child.samples == 1:
            places.add(child, int(redrawn and node is begin), rest)
        simulation.enter(child)
    for node in reversed(simulation.path[simulation.path.index(begin) + 1 :]):
        tree.refresh(node)
    return reviewed_type
