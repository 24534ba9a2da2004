"""Resumable stream of training prompts. Seed and cursor determine it; unfinished prompts are issued again."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import numpy as np

from rlsys.data.epochs import Epochs
from rlsys.data.left_out import LeftOut
from rlsys.errors import DataError
from rlsys.interfaces import Task
from rlsys.types import Prompt, Question, Split

# Number of generated prompts and demonstrations that are built before the start: 0.3 s for letter counting.
GENERATED_CHECKED = 2048
# Seconds after which this stops.
CHECK_S = 5.0
# Number of problems that are tried in place of a generated one whose prompt is unusable, and the distance of their
# indices, which no stream reaches.
SUBSTITUTES, FAR = 50, 1 << 40
# Number of prompts above which the check logs its expected duration: 0.05 ms to 0.5 ms per prompt.
SLOW_TO_CHECK = 20_000

_REMEDY = ": raise the former, lower the latter, or drop the prompt"

log = logging.getLogger(__name__)

Encode = Callable[[Question], list[int]]


class UnusablePromptError(DataError):
    """A prompt that is too long, or that the chat template cannot render."""


class PromptBuilder:
    """Builder of prompts from the problems of a task, within the length that the engines can take.

    Args:
        max_bad_rows: Largest share of the problems of a split that may be left out because their prompts are unusable.
            None: The first unusable prompt is an error. A generator draws other problems in their place.
    """

    def __init__(
        self, task: Task, encode: Encode, *, max_model_len: int, max_tokens: int, max_bad_rows: float | None = None
    ) -> None:
        self.task = task
        self.encode = encode
        self.longest = max_model_len - max_tokens
        self._max_bad_rows = max_bad_rows
        self._left_out: dict[Split, LeftOut] = {}

    def build(self, split: Split, index: int, suffix: str = "") -> Prompt:
        """Return the prompt of a problem.

        Args:
            split: Split of the task.
            index: Index of the problem in the split.
            suffix: Text to append to the problem's id.

        Raises:
            DataError: The prompt leaves no room for `max_tokens` in `max_model_len`, or cannot be rendered.
        """
        problem = self.task.problem(split, index)
        try:
            token_ids = self.encode(problem.question)
        except DataError as error:
            raise UnusablePromptError(f"prompt {problem.problem_id}: {error.message}") from None
        if len(token_ids) > self.longest:
            raise UnusablePromptError(
                f"prompt {problem.problem_id} has {len(token_ids)} tokens; actors.max_model_len minus "
                f"sampling.max_tokens leaves {self.longest}{_REMEDY}"
            )
        return Prompt(
            prompt_id=problem.problem_id + suffix,
            token_ids=np.asarray(token_ids, dtype=np.int32),
            answer=problem.answer,
            question=problem.question,
            metadata=problem.metadata,
        )

    def generated(self, index: int) -> Prompt:
        """Return the prompt of a generated training problem, or of another one if it is unusable."""
        others = SUBSTITUTES if self._max_bad_rows else 0
        for place in range(others):
            with suppress(UnusablePromptError):
                return self.build("train", index + place * FAR)
        return self.build("train", index + others * FAR)

    def first(self, split: Split, count: int) -> list[Prompt]:
        """Return the prompts of the first `count` usable problems of a split, or of all if there are fewer.

        Raises:
            ConfigError: More prompts are unusable than `max_bad_rows` allows.
        """
        size = self.task.size(split)
        prompts: list[Prompt] = []
        for index in range(count if size is None else size):
            if len(prompts) == count:
                break
            prompt = self._usable(split, index)
            prompts += [prompt] if prompt else []
        self._check_share(split)
        return prompts

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts, or all if there are fewer."""
        return self.first("held_out", count)

    def check(self, split: Split) -> None:
        """Build the prompts of a finite split, or the first ones of a generator, to find unusable prompts early.

        Raises:
            ConfigError: More prompts are unusable than `max_bad_rows` allows.
        """
        size = self.task.size(split)
        if size == 0:
            raise DataError(
                "task: it has no training problems, so it can only be evaluated; a benchmark reads task.train_path"
            )
        if size is not None and size > SLOW_TO_CHECK:
            log.warning("task: counting the tokens of %d prompts before the start, about %d s", size, size // 5000)
        deadline = time.monotonic() + CHECK_S
        for index in range(GENERATED_CHECKED if size is None else size):
            self._usable(split, index)
            if size is None and time.monotonic() > deadline:  # some generators take seconds for a problem
                break
        self._check_share(split)

    def usable(self, split: Split) -> Sequence[int] | None:
        """Return the indices of a finite split without those that `check` has left out; None for a generator."""
        size = self.task.size(split)
        left_out = self._left_out.get(split)
        return None if size is None else left_out.others(size) if left_out else range(size)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the prompts that were left out, one line each."""
        return tuple(note for left_out in self._left_out.values() for note in left_out.notes)

    def digest(self, digest: str) -> str:
        """Return the digest of the training problems without those that were left out."""
        left_out = self._left_out.get("train") if self.task.size("train") is not None else None
        return left_out.digest(digest) if left_out else digest

    def _usable(self, split: Split, index: int) -> Prompt | None:
        try:
            return self.build(split, index)
        except UnusablePromptError as error:
            size = self.task.size(split)
            if self._max_bad_rows is None:
                raise
            noun = "training prompts" if split == "train" else "held-out prompts"
            new = LeftOut(where="task", noun=noun, limit="task.max_bad_rows", share=self._max_bad_rows)
            new.total = GENERATED_CHECKED if size is None else size
            self._left_out.setdefault(split, new).add(index, error.message.removesuffix(_REMEDY))
            return None

    def _check_share(self, split: Split) -> None:
        if left_out := self._left_out.get(split):
            left_out.check()


class PromptStream:
    """Training prompts by stream index. A finite task is shuffled epoch by epoch.

    Attributes:
        cursor: The next new stream index.
    """

    def __init__(self, builder: PromptBuilder, seed: int) -> None:
        usable = builder.usable("train")
        self._builder = builder
        self._usable = range(0) if usable is None else usable
        self._epochs = None if usable is None else Epochs(len(usable), seed)
        self.cursor = 0
        self._reissue: deque[int] = deque()

    def seek(self, cursor: int, reissue: Iterable[int] = ()) -> None:
        """Continue with the indices in `reissue`, which were issued before but not trained, and then at `cursor`."""
        self.cursor = cursor
        self._reissue = deque(reissue)

    def waiting(self) -> tuple[int, ...]:
        """Return the indices that still wait to be reissued."""
        return tuple(self._reissue)

    def take(self) -> tuple[int, Prompt]:
        """Return the next stream index and its prompt."""
        if self._reissue:
            index = self._reissue.popleft()
        else:
            index, self.cursor = self.cursor, self.cursor + 1
        return index, self.prompt(index)

    def prompt(self, index: int) -> Prompt:
        """Return the prompt of a stream index. The epoch in its id makes its random draws differ between epochs."""
        if self._epochs is None:
            return self._builder.generated(index)
        problem = self._usable[self._epochs.position(index)]
        return self._builder.build("train", problem, suffix=f"@{self._epochs.epoch(index)}")
