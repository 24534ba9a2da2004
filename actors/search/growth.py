"""Growth of one tree: from completions to new nodes, which may wait for their values first."""

from __future__ import annotations

from collections.abc import Sequence

from actors.engine import Completion
from actors.search.jobs import Job
from actors.search.places import ChainPlaces, add_chain
from actors.search.reading import ChainPiece, CompletionReader
from actors.search.requests import Values
from actors.search.simulations import Simulation
from actors.search.tree import GrowingTree, Node
from actors.search.values.valuation import Valuation


class Growth:
    """The nodes that jobs bring to one tree.

    Args:
        places: Gets the new nodes; None if the search goes down paths.
        valuation: None if no values are asked for.
    """

    def __init__(
        self,
        tree: GrowingTree,
        reader: CompletionReader,
        places: ChainPlaces | None,
        valuation: Valuation | None,
    ) -> None:
        self._tree, self._reader, self._places, self._valuation = tree, reader, places, valuation

    def read(self, job: Job, completions: Sequence[Completion], *, asks: bool) -> None:
        """Read the nodes of a job into its `lines`, and in its `unvalued` those that must wait for values.

        Args:
            asks: Whether values may be asked for.
        """
        if job.kind == "chain":
            pairs = zip(job.plan.calls, completions, strict=True)
            job.lines = [[*self._reader.read_chain(job.node, *pair)] for pair in pairs]
        else:
            new = [*job.plan.fixed, *map(self._reader.read_node, job.plan.calls, completions)]
            job.lines = [[ChainPiece(node)] for node in new]
        job.unvalued = self._valuation.ask(job.node, job.lines, allowed=asks) if self._valuation else []

    def value(self, job: Job, values: Values) -> None:
        """Give the nodes of a job their values."""
        assert self._valuation is not None  # noqa: S101 - it has asked
        self._valuation.apply(job.unvalued, values)

    def add_children(self, job: Job) -> list[Node]:
        """Add children, and return the child of every draw."""
        job.node.expanding, job.node.expanded = False, True
        children = []
        for [piece] in job.lines:
            children.append(self._tree.add(job.node, piece.node))
            self._tree.refresh(children[-1])
        return children

    def add_chain(self, job: Job, simulation: Simulation) -> str | None:
        """Add the nodes of a chain and enter them; return the type of the node that the reviewer must write."""
        pieces = [piece for line in job.lines for piece in line]
        return add_chain(self._tree, simulation, pieces, self._places, redrawn=job.plan.redraws)

    def add_single(self, job: Job, simulation: Simulation) -> None:
        """Add the next node of a chain and enter it."""
        for [piece] in job.lines:
            child = self._tree.add(job.node, piece.node)
            simulation.enter(child)
            self._tree.refresh(child)
