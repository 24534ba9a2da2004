"""Common parts of the tasks that generate their problems: splits, held-out files, verdicts and chains."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar

from rlsys.config.tasks import GeneratedConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tasks import tags
from rlsys.tasks.steps import StepRules, judge_steps
from rlsys.types import Chain, Problem, Question, Split, StepVerdict, Verdict

MAX_DRAWS = 10_000
CORRECT = Verdict(outcome="ok", reward=1.0, answered=True)

Config = TypeVar("Config", bound=GeneratedConfig)
Instance = TypeVar("Instance")
"""Content of a problem as a task draws it."""


class GeneratedTask(ABC, Generic[Config, Instance]):
    """A task with random training problems. Held-out problems are random too, or come from a file.

    A hash assigns every problem to one split, so the splits are disjoint for any seeds and indices. The problems of a
    file are excluded from the train split. The file is read on first use, because a reward process does not need it.

    Attributes:
        one_answer: Whether every problem has one right answer.
        noun: Name of the things that the hash assigns to a split, for error messages.
    """

    one_answer: ClassVar[bool]
    noun: ClassVar[str] = "problem"

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.seed = seed

    @cached_property
    def _teacher(self) -> Self | None:
        """The task with the sizes of the demonstrations, None if they are those of the problems."""
        config = self.config.demonstrated()
        return None if config is None else type(self)(config, self.seed)

    def size(self, split: Split) -> int | None:
        """Return the number of problems in the held-out file; None for generated problems."""
        return len(self._file_problems) if split == "held_out" and self._file_problems else None

    def problem(self, split: Split, index: int) -> Problem:
        """Return the index-th problem of a split."""
        if split == "held_out" and self._file_problems:
            return self._file_problems[index]
        return self._generate(split, index)[0]

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, Chain]:
        """Return the index-th demonstrated problem and a chain for it; `rng` decides its nodes and errors.

        It is the train problem with this index, unless the config gives demonstrations sizes of their own.
        """
        if self._teacher is not None:
            return self._teacher.demonstration(index, rng)
        problem, instance = self._generate("train", index)
        return problem, self._chain(instance, rng)

    def check_steps(self, question: Question, completion: str) -> StepVerdict | None:
        """Judge the complete nodes of a chain or of its beginning; None if the question has an unknown form."""
        rules = self._step_rules(str(question))
        return None if rules is None else judge_steps(rules, completion)

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Return reward 1 if the only <answer>, which ends the completion, is right, else 0.

        Such an answer is complete, so it counts even if the completion then reached its length limit.
        """
        text = tags.final_answer(completion)
        return (
            wrong(tags.answer_fault(completion), answered=False) if text is None else self._judge(problem.answer, text)
        )

    def digest(self) -> str:
        """Return the sha256 of the problems of the held-out file, "" without a file."""
        # A task with several right answers repeats the question as the answer.
        names = ("problem_id", "question", "answer")[: 3 if self.one_answer else 2]
        rows = [[getattr(problem, name) for name in names] for problem in self._file_problems]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest() if rows else ""

    def notes(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def excluded(self) -> frozenset[str]:
        """Identities of the problems in the held-out file."""
        return frozenset(self.identity(str(problem.question)) for problem in self._file_problems)

    @cached_property
    def _file_problems(self) -> tuple[Problem, ...]:
        return self._read_problems()

    def _generate(self, split: Split, index: int) -> tuple[Problem, Instance]:
        """Draw until a problem belongs to the split."""
        rng = hashed_random(self.seed, split, index)
        for _ in range(MAX_DRAWS):
            instance = self._draw(rng)
            if instance is None:
                continue
            problem = self._problem(f"{split}-{index}", instance)
            identity = self.identity(str(problem.question))
            if self._is_held_out(identity) == (split == "held_out") and identity not in self.excluded:
                return problem, instance
        raise ConfigError(
            f"task: no {split} {self.noun} among {MAX_DRAWS} drawn; expected many possible {self.noun}s, found "
            f"{self._advice()}"
        )

    def _step_rules(self, question: str) -> StepRules[Any] | None:
        """Return the rules for the steps of a question, or None without rules."""
        return None

    @abstractmethod
    def _read_problems(self) -> tuple[Problem, ...]:
        """Return the problems of the held-out file; empty without a file."""

    @abstractmethod
    def _draw(self, rng: random.Random) -> Instance | None:
        """Return a random instance, or None to reject it."""

    @abstractmethod
    def _problem(self, problem_id: str, instance: Instance) -> Problem: ...

    @abstractmethod
    def _chain(self, instance: Instance, rng: random.Random) -> Chain: ...

    @abstractmethod
    def _judge(self, problem_answer: str, text: str) -> Verdict:
        """Judge the text of the only <answer>."""

    @abstractmethod
    def identity(self, question: str) -> str:
        """Return the part of a question that decides its split."""

    @abstractmethod
    def _is_held_out(self, identity: str) -> bool: ...

    @abstractmethod
    def _advice(self) -> str:
        """Return the number of possible problems and the config field that raises it."""


def wrong(detail: str = "", *, answered: bool = True) -> Verdict:
    return Verdict(outcome="wrong", reward=0.0, answered=answered, detail=detail)


def check_ids(problems: Sequence[Problem], message: str) -> None:
    """Raise DataError with `message` if two problems have the same id. Seeds of completions are hashed from ids."""
    [(name, times)] = Counter(problem.problem_id for problem in problems).most_common(1)
    if times > 1:
        raise DataError(f"{message} {name!r}; expected one each")


def hashed_random(*parts: object) -> random.Random:
    """Return a generator seeded by the sha256 of the parts, the same in every process and Python version."""
    text = ":".join(str(part) for part in parts)
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def join_nodes(
    present: Mapping[str, bool],
    *,
    sub_task: Callable[[], str],
    reclarify: Callable[[], str],
    hypothesis: Callable[[], str],
    thinking: Callable[[], Iterable[str]],
    double_check: Callable[[], str],
    answer: str,
) -> str:
    """Join the nodes of a worked chain in their fixed order.

    The texts are functions, so that only the texts of nodes that are present draw random numbers.

    Args:
        present: Whether the chain has a node, by tag (`tags.draw`). It always has thinking and answer nodes.
        sub_task, reclarify, hypothesis, double_check: Functions that return the text of the node.
        thinking: Function that returns the thinking and reflection nodes with their tags.
        answer: Text of the answer.
    """

    def optional(tag: str, text: Callable[[], str]) -> list[str]:
        return [tags.node(tag, text())] if present[tag] else []

    nodes = [
        *optional(tags.SUB_TASK, sub_task),
        *optional(tags.RECLARIFY, reclarify),
        *optional(tags.HYPOTHESIS, hypothesis),
        *thinking(),
        *optional(tags.DOUBLE_CHECK, double_check),
        tags.node(tags.ANSWER, answer),
    ]
    return "".join(nodes)
