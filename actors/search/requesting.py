"""Jobs of one tree that begin and end: what they request, and the nodes that wait for them."""

from __future__ import annotations

from typing import Literal

from actors.search.expansion import Plan
from actors.search.jobs import Job, JobQueue
from actors.search.simulations import Simulation
from actors.search.tree import GrowingTree, Node


class Requesting:
    """The jobs of one tree. A node with an open job counts it as waiting.

    Attributes:
        calls: Number of completions requested from engines.
    """

    def __init__(self, tree: GrowingTree, queue: JobQueue) -> None:
        self._tree, self._queue = tree, queue
        self.calls = 0

    def expand(
        self, kind: Literal["children", "single", "chain"], node: Node, simulation: Simulation, plan: Plan
    ) -> Job:
        """Return a job for a plan. Queue it if the plan has calls."""
        node.waiting += 1
        job = Job(kind, node, [simulation], plan)
        if plan.calls:
            self._queue.add(job)
            self.calls += len(plan.calls)
            simulation.has_requested = True
            self._tree.refresh(node)
        return job

    def ask(self, kind: Literal["verdict", "reply"], node: Node, simulation: Simulation | None) -> None:
        """Request the verdict on the chain, or the reply to the turn, that ends at a node.

        Args:
            simulation: The one that waits for it, if there is one.
        """
        node.expanded = node.expanded or kind == "reply"
        node.waiting += 1
        self._queue.add(Job(kind, node, [] if simulation is None else [simulation]))
        self._tree.refresh(node)

    def ask_values(self, job: Job) -> None:
        """Request the values of the nodes that a job has brought."""
        self._queue.add_values(job)
        self.calls += sum(len(calls) for each in job.unvalued for calls in each.thoughts.rollouts)
        self._tree.refresh(job.node)

    def close(self, job: Job) -> None:
        """End a job."""
        job.node.waiting -= 1
        self._tree.refresh(job.node)
