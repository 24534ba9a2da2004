"""The resumable prompt stream: (seed, epoch, cursor) in, Prompt out; what was in flight is issued again."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from rlsys.errors import ConfigError
from rlsys.interfaces import Task
from rlsys.types import Prompt, Split

# Of a generator, this many prompts and demonstrations are built up front: 0.3 s for letter counting.
GENERATED_CHECKED = 2048
# Above this many prompts a user should know what takes so long: 0.05 ms to 0.5 ms a prompt.
SLOW_TO_CHECK = 20_000

log = logging.getLogger(__name__)

Encode = Callable[[str], list[int]]


class PromptBuilder:
    """Problems of a task as prompts, of a length the engines can take.

    Raises:
        ConfigError: a prompt leaves no room for `max_tokens` in `max_model_len`.
    """

    def __init__(self, task: Task, encode: Encode, *, max_model_len: int, max_tokens: int) -> None:
        self.task = task
        self.encode = encode
        self.longest = max_model_len - max_tokens

    def build(self, split: Split, index: int, suffix: str = "") -> Prompt:
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
        """The first `count` held-out prompts, or all where there are fewer."""
        size = self.task.size("held_out")
        return [self.build("held_out", index) for index in range(count if size is None else min(count, size))]

    def check(self, split: Split) -> None:
        """Build the first prompts of a split, of a finite one all, so that a too long one is found before the start."""
        size = self.task.size(split)
        if size is not None and size > SLOW_TO_CHECK:
            log.warning("task: measuring %d prompts in tokens before the start, about %d s", size, size // 5000)
        for index in range(GENERATED_CHECKED if size is None else size):
            self.build(split, index)


class PromptStream:
    """Training prompts by stream index: epoch after epoch, each in its own seeded order.

    `cursor` is the next new index.
    """

    def __init__(self, builder: PromptBuilder, seed: int) -> None:
        self._builder = builder
        self._seed = seed
        self.cursor = 0
        self._reissue: deque[int] = deque()
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def seek(self, cursor: int, reissue: Iterable[int] = ()) -> None:
        """Continue at `cursor`, after the indices in `reissue`, which were issued before and not trained."""
        self.cursor = cursor
        self._reissue = deque(reissue)

    def waiting(self) -> tuple[int, ...]:
        """Indices that are still to be issued again."""
        return tuple(self._reissue)

    def take(self) -> tuple[int, Prompt]:
        """The next stream index and its prompt."""
        if self._reissue:
            index = self._reissue.popleft()
        else:
            index, self.cursor = self.cursor, self.cursor + 1
        return index, self.prompt(index)

    def prompt(self, index: int) -> Prompt:
        """The prompt of a stream index. Its id names the epoch, so that it is sampled anew in each."""
        size = self._builder.task.size("train")
        if size is None:
            return self._builder.build("train", index)
        epoch, position = divmod(index, size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(size)
        return self._builder.build("train", int(self._order[position]), suffix=f"@{epoch}")
