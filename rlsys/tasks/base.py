"""Base class of tasks that users write."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

from rlsys.tasks.tags import tag_strings
from rlsys.types import Problem, Question, Split, StepVerdict, Verdict


class BaseTask(ABC):
    """A task with defaults for everything but its problems and its verifier. `rlsys.interfaces.Task` explains them.

    Attributes:
        one_answer: Whether `Problem.answer` is the only right answer.
    """

    one_answer: bool = True

    def size(self, split: Split) -> int | None:
        """Return None: problems are generated without a limit."""
        return None

    @abstractmethod
    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with an index, which is the same in every process."""

    @abstractmethod
    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Judge a completion. `finished` is False if it was cut off."""

    def check_steps(self, question: Question, completion: str) -> StepVerdict | None:
        """Return None: there are no rules for steps."""
        return None

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
        """Return None: there are no worked examples."""
        return None

    def digest(self) -> str:
        """Return "": no data was read."""
        return ""

    def notes(self) -> tuple[str, ...]:
        """Return nothing to tell the user."""
        return ()

    def vocabulary(self) -> tuple[str, ...]:
        """Return the tags of thoughts and the characters of English text, for a model from scratch."""
        return (*tag_strings(), "\n", *map(chr, range(ord(" "), 127)))
