"""Count the simulations of a tree that are under way, and back up their results."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.search.tree import GrowingTree, Node, Status


@dataclass(slots=True, eq=False)
class Simulation:
    """One pass through the tree.

    Attributes:
        path: the nodes from the prompt down to the present one.
        requested: whether it has asked a model for a completion.
    """

    path: list[Node] = field(default_factory=list)
    requested: bool = False

    @property
    def node(self) -> Node:
        return self.path[-1]

    def enter(self, node: Node) -> None:
        node.in_flight += 1
        self.path.append(node)


class Simulations:
    """The simulations of one tree: how many have begun, are running and have finished."""

    def __init__(self, tree: GrowingTree) -> None:
        self._tree = tree
        self.begun = self.running = self.finished = 0

    def begin(self, node: Node) -> Simulation:
        """Begin a simulation that has gone from the prompt down to `node`."""
        simulation = Simulation()
        for ancestor in [*node.upwards()][::-1]:
            simulation.enter(ancestor)
        self.begun += 1
        self.running += 1
        return simulation

    def leave(self, simulation: Simulation) -> None:
        """End a simulation without a value.

        A simulation that requested nothing because others blocked its way does not count as begun.
        """
        counts = simulation.requested or simulation.node.status is not Status.BLOCKED
        self.finished += counts
        self.begun -= not counts
        self.running -= 1
        for node in simulation.path:
            node.in_flight -= 1
            node.tried += counts

    def back_up(self, simulation: Simulation, reward: float) -> None:
        """End a simulation with the reward of its chain."""
        self.finished += 1
        self.running -= 1
        for node in simulation.path:
            node.in_flight -= 1
        self._tree.back_up(simulation.node, reward)
