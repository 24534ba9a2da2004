"""Unfinished simulations of one tree, and the effect of their end on its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.search.stopping import StopRule
from actors.search.tree import GrowingTree, Node, Status
from actors.search.values.agreement import Agreement
from rlsys.trees import answer_text
from rlsys.types import Verdict


@dataclass(slots=True, eq=False)
class Simulation:
    """An unfinished simulation.

    Attributes:
        path: Nodes from the prompt to its present position.
        has_requested: Whether it has requested completions.
    """

    path: list[Node] = field(default_factory=list)
    has_requested: bool = False

    @property
    def node(self) -> Node:
        return self.path[-1]

    def enter(self, node: Node) -> None:
        node.in_flight += 1
        self.path.append(node)


class Simulations:
    """The simulations of one tree: their begin, their end and their number.

    Args:
        agreement: Gives the rewards of answers in place of the verdicts; None if the verdicts do.

    Attributes:
        running: Number of unfinished simulations.
    """

    def __init__(self, tree: GrowingTree, stop: StopRule, agreement: Agreement | None) -> None:
        self._tree, self._stop, self._agreement = tree, stop, agreement
        self.running = 0

    def begin(self, node: Node) -> Simulation:
        """Begin a simulation at a node. It is in flight at the node and all its ancestors."""
        simulation = Simulation()
        for above in [*node.upwards()][::-1]:
            simulation.enter(above)
        self._stop.begun += 1
        self.running += 1
        return simulation

    def leave(self, simulation: Simulation) -> None:
        """End a simulation without a reward. Do not count it if others blocked it before its first request."""
        counts = simulation.has_requested or simulation.node.status is not Status.BLOCKED
        self._stop.finished += counts
        self._stop.begun -= not counts
        self.running -= 1
        for node in simulation.path:
            node.in_flight -= 1
            node.unrewarded += counts

    def back_up(self, simulation: Simulation, reward: float) -> None:
        """End a simulation with the reward of the chain that it reached."""
        self._finish(simulation)
        self._tree.back_up(simulation.node, reward)

    def fail(self, node: Node, simulation: Simulation | None, reward: float) -> None:
        """End a chain without an answer, which agrees with no other.

        Args:
            simulation: The one that ends there; None if none has entered the node. Then every draw of it counts.
        """
        reward = reward if self._agreement is None else 0.0
        if simulation is not None:
            self.back_up(simulation, reward)
            return
        while node.visits < node.samples:
            self._tree.back_up(node, reward)

    def end(self, simulation: Simulation, verdict: Verdict) -> None:
        """End a simulation with the verdict on its answer. A failed verification gives no reward."""
        if verdict.outcome not in ("ok", "wrong"):
            self.leave(simulation)
            return
        if simulation.node.finish_reason == "turns":  # its last turn is no answer that could agree with others
            self.fail(simulation.node, simulation, verdict.reward)
            return
        if not any(node.backtrack for node in simulation.path):  # such a chain was told what is wrong
            self._stop.votes[answer_text(simulation.node.text)] += 1
        if self._agreement is None:
            self.back_up(simulation, verdict.reward)
        else:
            self._finish(simulation)
            self._agreement.back_up(simulation.node)

    def _finish(self, simulation: Simulation) -> None:
        self._stop.finished += 1
        self.running -= 1
        for node in simulation.path:
            node.in_flight -= 1
