"""Open requests of one tree, and the order in which their answers are applied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.engine import Completion
from actors.search.expansion import Plan
from actors.search.requests import Ask, Judge, Request
from actors.search.simulations import Simulation
from actors.search.tree import Node
from rlsys.types import Verdict

Answer = Sequence[Completion] | Verdict


@dataclass(slots=True, eq=False)
class Job:
    """An expansion or a verdict that has not been applied to the tree.

    Attributes:
        simulations: Simulations that wait for it. Only "children" jobs have more than one.
        number: Number of its request; -1 if it needs no request.
    """

    kind: Literal["children", "single", "chain", "verdict"]
    node: Node
    simulations: list[Simulation]
    plan: Plan = field(default_factory=Plan)
    number: int = -1


class JobQueue:
    """Jobs whose requests are open.

    Completions are applied in the order of their requests, whatever the order of their arrival. Every open verdict is
    applied before the next completion, so that the simulation of a short chain does not wait for longer chains.
    """

    def __init__(self) -> None:
        self._expansions: deque[Job] = deque()
        self._verdicts: deque[Job] = deque()
        self._answers: dict[int, Answer] = {}
        self._requests: list[Request] = []
        self._next_number = 0

    def add(self, job: Job) -> None:
        """Number a job and queue its request."""
        job.number = self._next_number
        self._next_number += 1
        if job.kind == "verdict":
            self._verdicts.append(job)
            self._requests.append(Judge(job.number, "".join(step.text for step in job.node.path())))
        else:
            self._expansions.append(job)
            self._requests.append(Ask(job.number, tuple(planned.call for planned in job.plan.calls)))

    def take_requests(self) -> list[Request]:
        """Return the requests since the last call."""
        requests, self._requests = self._requests, []
        return requests

    def put_answer(self, number: int, answer: Answer) -> None:
        """Store the answer to a request until `take_answered` returns it."""
        self._answers[number] = answer

    def take_answered(self) -> tuple[Job, Answer] | None:
        """Remove and return the next job and its answer; None if the answer has not arrived."""
        jobs = self._verdicts or self._expansions
        if not jobs or jobs[0].number not in self._answers:
            return None
        job = jobs.popleft()
        return job, self._answers.pop(job.number)

    @property
    def is_empty(self) -> bool:
        return not self._expansions and not self._verdicts
