"""Unfinished simulations of one tree, and what their end adds to its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.search.stopping import StopRule
from actors.search.tree import GrowingTree, Node, Status
from rlsys.types import Verdict


@dataclass(slots=True, eq=False)
class Simulation:
    """An unfinished simulation.

    Attributes:
        path: Nodes from the prompt to its present position.
        asked: Whether a model was asked for it.
    """

    path: list[Node] = field(default_factory=list)
    asked: bool = False

    @property
    def node(self) -> Node:
        return self.path[-1]

    def enter(self, node: Node) -> None:
        node.in_flight += 1
        self.path.append(node)


class Simulations:
    """Begins and ends the simulations of one tree, and counts them.

    Attributes:
        running: Number of unfinished simulations.
    """

    def __init__(self, tree: GrowingTree, stop: StopRule) -> None:
        self._tree, self._stop = tree, stop
        self.running = 0

    def begin(self, node: Node) -> Simulation:
        """Begin a simulation at a node. It counts at the node's ancestors, too."""
        simulation = Simulation()
        for above in [*node.upwards()][::-1]:
            simulation.enter(above)
        self._stop.begun += 1
        self.running += 1
        return simulation

    def leave(self, simulation: Simulation) -> None:
        """End a simulation without a reward. It does not count if others blocked it before it asked for anything."""
        counts = simulation.asked or simulation.node.status is not Status.BLOCKED
        self._stop.finished += counts
        self._stop.begun -= not counts
        self.running -= 1
        for node in simulation.path:
            node.in_flight -= 1
            node.tried += counts

    def back_up(self, simulation: Simulation, reward: float) -> None:
        """End a simulation with the reward of the chain that it reached."""
        self._stop.finished += 1
        self.running -= 1
        for node in simulation.path:
            node.in_flight -= 1
        self._tree.back_up(simulation.node, reward)

    def end(self, simulation: Simulation, verdict: Verdict) -> None:
        """End a simulation with a verdict. A failed verification gives no reward."""
        if verdict.outcome in ("ok", "wrong"):
            self.back_up(simulation, verdict.reward)
        else:
            self.leave(simulation)
