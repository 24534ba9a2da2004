"""Open requests of one tree, and the order in which their answers are applied."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.engine import Completion
from actors.search.expansion import Plan
from actors.search.reading import Line
from actors.search.requests import Ask, Judge, Request, Turn, Value, Values
from actors.search.simulations import Simulation
from actors.search.tree import Node
from actors.search.turns import is_cut_off, turn_texts
from actors.search.values.valuation import Unvalued
from rlsys.interfaces import Reply
from rlsys.types import Verdict

Answer = Sequence[Completion] | Verdict | Reply | Values


@dataclass(slots=True, eq=False)
class Job:
    """An expansion, a verdict or a reply that has not been applied to the tree.

    Attributes:
        simulations: Simulations that wait for it. Only "children" jobs have more than one. A verdict or reply has
            none for a chain that failed at a child before a simulation has entered the child.
        number: Number of its request; -1 if it needs no request.
        lines: The nodes that its completions have brought, which wait for their values.
        unvalued: Those of them whose values are open.
    """

    kind: Literal["children", "single", "chain", "verdict", "reply"]
    node: Node
    simulations: list[Simulation]
    plan: Plan = field(default_factory=Plan)
    number: int = -1
    lines: list[Line] = field(default_factory=list)
    unvalued: list[Unvalued] = field(default_factory=list)


class JobQueue:
    """Jobs whose requests are open.

    Completions are applied in the order of their requests, whatever the order of their arrival. All open verdicts,
    replies and values are applied before the next completion, in their own order, so that the simulation of a short
    chain does not wait for longer chains, and a node is not chosen before its value is known.
    """

    def __init__(self) -> None:
        self._expansions: deque[Job] = deque()
        self._judgements: deque[Job] = deque()
        self._answers: dict[int, Answer] = {}
        self._requests: list[Request] = []
        self._next_number = 0

    def add(self, job: Job) -> None:
        """Number a job and queue its request."""
        self._number(job)
        if job.kind in ("verdict", "reply"):
            self._judgements.append(job)
            self._requests.append(_judgement(job))
        else:
            self._expansions.append(job)
            self._requests.append(Ask(job.number, tuple(planned.call for planned in job.plan.calls)))

    def add_values(self, job: Job) -> None:
        """Queue the request for the values of the nodes that a job has brought."""
        self._number(job)
        self._judgements.append(job)
        self._requests.append(Value(job.number, tuple(each.thoughts for each in job.unvalued)))

    def _number(self, job: Job) -> None:
        job.number = self._next_number
        self._next_number += 1

    def take_requests(self) -> list[Request]:
        """Return the requests since the last call."""
        requests, self._requests = self._requests, []
        return requests

    def put_answer(self, number: int, answer: Answer) -> None:
        """Store the answer to a request until `take_answered` returns it."""
        self._answers[number] = answer

    def take_answered(self) -> tuple[Job, Answer] | None:
        """Remove and return the next job and its answer; None if the answer has not arrived."""
        jobs = self._judgements or self._expansions
        if not jobs or jobs[0].number not in self._answers:
            return None
        job = jobs.popleft()
        return job, self._answers.pop(job.number)

    @property
    def is_empty(self) -> bool:
        return not self._expansions and not self._judgements


def _judgement(job: Job) -> Judge | Turn:
    turns = turn_texts(job.node)
    if job.kind == "reply":
        return Turn(job.number, turns)
    return Judge(job.number, "".join(turns), finished=not is_cut_off(job.node))
