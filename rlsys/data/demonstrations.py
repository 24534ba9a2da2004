"""Demonstrations of a task as token ids. A step always gets the same demonstrations."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from rlsys.data.epochs import Epochs
from rlsys.data.prompts import GENERATED_CHECKED
from rlsys.errors import ConfigError, DataError
from rlsys.interfaces import Task
from rlsys.types import Demonstration

EncodePair = Callable[[str, str], tuple[list[int], int]]
"""Function of a question and a chain: returns the token ids of both with the end token, and the prompt length."""


class DemonstrationStream:
    """Demonstrations of a task by step. The demonstrations of a finite task are shuffled epoch by epoch."""

    def __init__(self, task: Task, encode: EncodePair, *, seed: int, rows_per_step: int, max_tokens: int) -> None:
        self._task = task
        self._encode = encode
        self._seed = seed
        self._rows_per_step = rows_per_step
        self._max_tokens = max_tokens
        self._size = task.size("train")
        self._epochs = None if self._size is None else Epochs(self._size, seed)

    def rows(self, step: int) -> list[Demonstration]:
        """Return the demonstrations of a step, counted from 0."""
        first = step * self._rows_per_step
        return [self._row(index) for index in range(first, first + self._rows_per_step)]

    def check(self) -> None:
        """Build the demonstrations of a finite task, or the first ones of a generator, to find errors early."""
        for index in range(GENERATED_CHECKED if self._size is None else self._size):
            self._row(index)

    def _row(self, index: int) -> Demonstration:
        position = index if self._epochs is None else self._epochs.position(index)
        demonstration = self._task.demonstration(position, random.Random(f"{self._seed}/{index}"))
        if demonstration is None:
            raise DataError(
                "the task has no demonstrations, but the stage warm_start or objective.sft.source demonstrations needs "
                "them: set task.demonstration_column, or change stages or objective.sft"
            )
        problem, chain = demonstration
        token_ids, prompt_length = self._encode(problem.question, chain)
        if len(token_ids) > self._max_tokens:
            raise ConfigError(
                f"the demonstration of {problem.problem_id} has {len(token_ids)} tokens, "
                f"actors.max_model_len is {self._max_tokens}: raise it or shorten the demonstrations"
            )
        return Demonstration(
            token_ids=np.asarray(token_ids, dtype=np.int32),
            loss_mask=np.arange(len(token_ids)) >= prompt_length,
        )
