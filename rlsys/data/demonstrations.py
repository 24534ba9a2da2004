"""Demonstrations of a task as token ids. A step always gets the same demonstrations."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from rlsys.data.epochs import Epochs
from rlsys.data.left_out import LeftOut
from rlsys.data.prompts import GENERATED_CHECKED
from rlsys.errors import DataError
from rlsys.interfaces import Task
from rlsys.types import Chain, Demonstration, Question

_REMEDY = ": raise it or shorten the demonstrations"

EncodePair = Callable[[Question, Chain], tuple[list[int], list[bool]]]
"""Function of a question and a chain: returns the token ids of both with the end token, and which to train."""


class UnusableDemonstrationError(DataError):
    """A demonstration that is too long, or whose prompt the chat template cannot render."""


class DemonstrationStream:
    """Demonstrations of a task by step. The demonstrations of a finite task are shuffled epoch by epoch.

    Args:
        max_bad_rows: Largest share of the demonstrations that may be left out because they are unusable. None: The
            first unusable one is an error.
    """

    def __init__(
        self,
        task: Task,
        encode: EncodePair,
        *,
        seed: int,
        rows_per_step: int,
        max_tokens: int,
        max_bad_rows: float | None = None,
    ) -> None:
        self._task = task
        self._encode = encode
        self._seed = seed
        self._rows_per_step = rows_per_step
        self._max_tokens = max_tokens
        size = task.size("train")
        self._usable: Sequence[int] | None = None if size is None else range(size)
        self._epochs = None if size is None else Epochs(size, seed)
        self._left_out = (
            None
            if max_bad_rows is None or size is None
            else LeftOut(where="task", noun="demonstrations", limit="task.max_bad_rows", share=max_bad_rows, total=size)
        )

    def rows(self, step: int) -> list[Demonstration]:
        """Return the demonstrations of a step, counted from 0."""
        first = step * self._rows_per_step
        return [self._row(index) for index in range(first, first + self._rows_per_step)]

    def check(self) -> None:
        """Build the demonstrations of a finite task, or the first ones of a generator, to find errors early.

        The unusable rows of a data set are left out from then on.

        Raises:
            ConfigError: More demonstrations are unusable than `max_bad_rows` allows.
        """
        if self._usable is None:
            for index in range(GENERATED_CHECKED):
                self._row(index)
            return
        for position in self._usable:
            try:
                self._build(position, 0)
            except UnusableDemonstrationError as error:
                if self._left_out is None:
                    raise
                self._left_out.add(position, error.message.removesuffix(_REMEDY))
        self._leave_out()

    def leave_out_as(self, other: DemonstrationStream) -> None:
        """Leave out the rows that another stream of the same task has left out in its check."""
        self._left_out = other._left_out
        self._leave_out()

    def _leave_out(self) -> None:
        if self._left_out is not None and self._left_out.reasons:
            self._left_out.check()
            self._usable = self._left_out.others(self._left_out.total)
            self._epochs = Epochs(len(self._usable), self._seed)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the demonstrations that were left out, one line each."""
        return self._left_out.notes if self._left_out is not None else ()

    def digest(self, digest: str) -> str:
        """Return the digest of the demonstrations without those that were left out."""
        return self._left_out.digest(digest) if self._left_out is not None else digest

    def _row(self, index: int) -> Demonstration:
        if self._epochs is None or self._usable is None:
            return self._build(index, index)
        return self._build(self._usable[self._epochs.position(index)], index)

    def _build(self, position: int, index: int) -> Demonstration:
        """Return the demonstration at a position of the task, with the random draws of an index of the stream."""
        demonstration = self._task.demonstration(position, random.Random(f"{self._seed}/{index}"))
        if demonstration is None:
            raise DataError(
                "the task has no demonstrations, but the stage warm_start or objective.sft.source demonstrations needs "
                "them: set task.demonstration_column, or change stages or objective.sft"
            )
        problem, chain = demonstration
        try:
            token_ids, trained = self._encode(problem.question, chain)
        except DataError as error:
            raise UnusableDemonstrationError(f"the demonstration of {problem.problem_id}: {error.message}") from None
        if len(token_ids) > self._max_tokens:
            raise UnusableDemonstrationError(
                f"the demonstration of {problem.problem_id} has {len(token_ids)} tokens, "
                f"actors.max_model_len is {self._max_tokens}{_REMEDY}"
            )
        return Demonstration(
            token_ids=np.asarray(token_ids, dtype=np.int32),
            loss_mask=np.asarray(trained, dtype=np.bool_),
        )
