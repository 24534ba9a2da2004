"""Keep the requests of one tree in order, and release their answers in that order.

Answers of models are applied in the order of their requests. A verdict is applied before all completions that were
requested in the meantime. So the tree does not depend on which answer arrives first, and a short chain does not wait
for longer ones behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.search.expansion import Plan
from actors.search.requests import Ask, Drawn, Judge
from actors.search.simulations import Simulation
from actors.search.tree import Node
from rlsys.types import Verdict

Request = Ask | Judge
Answer = Sequence[Drawn] | Verdict


@dataclass(slots=True, eq=False)
class Job:
    """A request whose answer is not applied yet: nodes below `node`, or its verdict."""

    number: int
    kind: Literal["children", "single", "chain", "verdict"]
    node: Node
    simulations: list[Simulation]
    plan: Plan = field(default_factory=Plan)


class JobQueue:
    """The requests of one tree that wait for answers, and answers that wait for their turn."""

    def __init__(self) -> None:
        self._completions: deque[Job] = deque()
        self._verdicts: deque[Job] = deque()
        self._answers: dict[int, Answer] = {}
        self._requests: list[Request] = []
        self.next_number = 0

    @property
    def empty(self) -> bool:
        """Whether no request waits for its answer to be applied."""
        return not self._completions and not self._verdicts

    def put(self, job: Job, request: Request) -> None:
        """Add the next request."""
        self.next_number += 1
        (self._verdicts if isinstance(request, Judge) else self._completions).append(job)
        self._requests.append(request)

    def take_requests(self) -> list[Request]:
        """Return the requests that were added since the last call."""
        requests, self._requests = self._requests, []
        return requests

    def answer(self, number: int, answer: Answer) -> None:
        """Keep the answer to a request."""
        self._answers[number] = answer

    def pop_ready(self) -> tuple[Job, Answer] | None:
        """Return the job whose turn it is with its answer, or None while that answer is missing."""
        queue = self._verdicts or self._completions
        if not queue or queue[0].number not in self._answers:
            return None
        job = queue.popleft()
        return job, self._answers.pop(job.number)
