"""Rows of the warm start: the same step always gets the same demonstrations."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from rlsys.data.prompts import GENERATED_CHECKED
from rlsys.errors import ConfigError, DataError
from rlsys.interfaces import Task
from rlsys.types import Demonstration

# question, chain -> token ids of both with the end token, and the length of the prompt
EncodePair = Callable[[str, str], tuple[list[int], int]]


class Epochs:
    """Positions in a finite data set by index of a stream: each epoch has all of them, in a seeded order of its own."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def position(self, index: int) -> int:
        epoch, position = divmod(index, self._size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._size)
        return int(self._order[position])


class DemonstrationStream:
    """Tokenised demonstrations by step. Finite tasks are shuffled epoch by epoch."""

    def __init__(self, task: Task, encode: EncodePair, *, seed: int, rows_per_step: int, max_tokens: int) -> None:
        self._task = task
        self._encode = encode
        self._seed = seed
        self._rows_per_step = rows_per_step
        self._max_tokens = max_tokens
        size = task.size("train")
        self._epochs = None if size is None else Epochs(size, seed)

    def rows(self, step: int) -> list[Demonstration]:
        """The demonstrations of a step, counted from 0."""
        first = step * self._rows_per_step
        return [self._row(index) for index in range(first, first + self._rows_per_step)]

    def check(self) -> None:
        """Build the first demonstrations, of a finite task all, so that a bad one is found before anything starts."""
        size = self._task.size("train")
        for index in range(GENERATED_CHECKED if size is None else size):
            self._row(index)

    def _row(self, index: int) -> Demonstration:
        found = self._task.demonstration(self._position(index), random.Random(f"{self._seed}/{index}"))
        if found is None:
            raise DataError(
                "stage warm_start and objective.sft.source demonstrations need demonstrations, and the task has none: "
                "set task.demonstration_column, or leave them out"
            )
        problem, chain = found
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

    def _position(self, index: int) -> int:
        return index if self._epochs is None else self._epochs.position(index)
