"""Keeps the buffer's slots filled: prompts out to the actors, groups back into their slots."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rlsys.buffer import Buffer
from rlsys.errors import TooManyFailuresError
from rlsys.interfaces import RolloutPool
from rlsys.prompts import PromptStream
from rlsys.types import Prompt, RolloutFailure, SamplingSettings

Issued = tuple[int, Prompt]


class Producer:
    """Issues prompts into free slots as soon as there are any.

    All free slots are dealt over the actors in one dispatch each, so that an engine's first batch does not
    depend on timing. A failed rollout is counted and its slot given to the next prompt; above
    `max_failed_share` of all rollouts the run ends; a single one is no share yet, unless the share is 0.

    Args:
        failed, finished: rollouts of the run before this one, where it is resumed.
    """

    def __init__(
        self,
        pool: RolloutPool,
        stream: PromptStream,
        buffer: Buffer,
        settings: SamplingSettings,
        max_failed_share: float,
        failed: int = 0,
        finished: int = 0,
    ) -> None:
        self._pool = pool
        self._stream = stream
        self._buffer = buffer
        self._settings = settings
        self._max_failed_share = max_failed_share
        self.failed = failed
        self._finished = finished

    async def run(self) -> None:
        """Never returns; ends by being cancelled or by the first error of a dispatch."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                free = await self._buffer.free()
                issued = [self._stream.take() for _ in range(free)]
                for index, _ in issued:
                    self._buffer.reserve(index)
                for actor in range(self._pool.count):
                    part = issued[actor :: self._pool.count]
                    if part:
                        tasks.create_task(self._dispatch(actor, part))

    async def _dispatch(self, actor: int, issued: Sequence[Issued]) -> None:
        while issued:
            groups = await self._pool.generate(actor, [prompt for _, prompt in issued], self._settings)
            failures: list[tuple[int, RolloutFailure]] = []
            for (index, _), group in zip(issued, groups, strict=True):
                if isinstance(group, RolloutFailure):
                    failures.append((index, group))
                else:
                    self._finished += 1
                    await self._buffer.finish(index, group)
            # After the good ones, so that the share does not depend on the order within a batch.
            issued = [self._replace(index, failure) for index, failure in failures]

    def _replace(self, index: int, failure: RolloutFailure) -> Issued:
        self.failed += 1
        total = self.failed + self._finished
        allowed = max(1.0, self._max_failed_share * total) if self._max_failed_share else 0.0
        if self.failed > allowed:
            raise TooManyFailuresError(
                f"{self.failed} of {total} rollouts failed, more than train.max_failed_rollouts = "
                f"{self._max_failed_share}; the last: {failure.reason}"
            )
        replacement = self._stream.take()
        self._buffer.replace(index, replacement[0])
        return replacement
