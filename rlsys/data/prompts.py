"""Resumable stream of training prompts. Seed and cursor determine it; unfinished prompts are issued again."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from rlsys.data.epochs import Epochs
from rlsys.errors import ConfigError
from rlsys.interfaces import Task
from rlsys.types import Prompt, Split

# Number of generated prompts and demonstrations that are built before the start: 0.3 s for letter counting.
GENERATED_CHECKED = 2048
# Number of prompts above which the check logs its expected duration: 0.05 ms to 0.5 ms per prompt.
SLOW_TO_CHECK = 20_000

log = logging.getLogger(__name__)

Encode = Callable[[str], list[int]]


class PromptBuilder:
    """Builder of prompts from the problems of a task, within the length that the engines can take."""

    def __init__(self, task: Task, encode: Encode, *, max_model_len: int, max_tokens: int) -> None:
        self.task = task
        self.encode = encode
        self.longest = max_model_len - max_tokens

    def build(self, split: Split, index: int, suffix: str = "") -> Prompt:
        """Return the prompt of a problem.

        Args:
            split: Split of the task.
            index: Index of the problem in the split.
            suffix: Text to append to the problem's id.

        Raises:
            ConfigError: The prompt leaves no room for `max_tokens` in `max_model_len`.
        """
        problem = self.task.problem(split, index)
        token_ids = self.encode(problem.question)
        if len(token_ids) > self.longest:
            raise ConfigError(
                f"prompt {problem.problem_id} has {len(token_ids)} tokens; actors.max_model_len minus "
                f"sampling.max_tokens leaves {self.longest}: raise the former, lower the latter, or drop the prompt"
            )
        return Prompt(
            prompt_id=problem.problem_id + suffix,
            token_ids=np.asarray(token_ids, dtype=np.int32),
            answer=problem.answer,
            question=problem.question,
        )

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts, or all if there are fewer."""
        size = self.task.size("held_out")
        return [self.build("held_out", index) for index in range(count if size is None else min(count, size))]

    def check(self, split: Split) -> None:
        """Build the prompts of a finite split, or the first ones of a generator, to find overlong prompts early.

        Raises:
            ConfigError: A prompt is too long.
        """
        size = self.task.size(split)
        if size is not None and size > SLOW_TO_CHECK:
            log.warning("task: counting the tokens of %d prompts before the start, about %d s", size, size // 5000)
        for index in range(GENERATED_CHECKED if size is None else size):
            self.build(split, index)


class PromptStream:
    """Training prompts by stream index. A finite task is shuffled epoch by epoch.

    Attributes:
        cursor: The next new stream index.
    """

    def __init__(self, builder: PromptBuilder, seed: int) -> None:
        size = builder.task.size("train")
        self._builder = builder
        self._epochs = None if size is None else Epochs(size, seed)
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
            return self._builder.build("train", index)
        return self._builder.build("train", self._epochs.position(index), suffix=f"@{self._epochs.epoch(index)}")
