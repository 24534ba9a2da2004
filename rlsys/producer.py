"""Keeps the buffer's slots filled: prompts out to the actors, groups back into their slots."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from rlsys.buffer import Buffer
from rlsys.failures import FailureLimit
from rlsys.interfaces import RolloutPool
from rlsys.prompts import PromptStream
from rlsys.types import Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup

Issued = tuple[int, Prompt]


def is_searched(index: int, fraction: float) -> bool:
    """Whether the prompt of a stream index is searched instead of sampled: floor((i + 1) f) > floor(i f).

    So of the first n prompts floor(n f) are searched, evenly spread, and a prompt that is issued again is again.
    """
    return math.floor((index + 1) * fraction) > math.floor(index * fraction)


class Producer:
    """Issues prompts into free slots as soon as there are any.

    All free slots are a wave, dealt over the actors. What an actor samples is one dispatch, so that an engine's first
    batch does not depend on timing; every searched prompt is one of its own, so that no tree waits for another to
    reach its slot. A failed rollout is counted and its slot given to the next prompt, once the whole wave has answered
    and in order of issue.
    So with train.max_staleness 0, where a wave is a step, the replacements do not depend on timing either; with more,
    waves overlap and the one that answers first takes the next prompt.

    Args:
        failures: counts the rollouts of the run, searched ones too, and ends it where too many fail.
        search_fraction: share of the prompts that are searched instead of sampled.
    """

    def __init__(
        self,
        pool: RolloutPool,
        stream: PromptStream,
        buffer: Buffer,
        settings: SamplingSettings,
        failures: FailureLimit,
        search_fraction: float,
    ) -> None:
        self._pool = pool
        self._stream = stream
        self._buffer = buffer
        self._settings = settings
        self._failures = failures
        self._search_fraction = search_fraction

    async def run(self) -> None:
        """Never returns; ends by being cancelled or by the first error of a dispatch."""
        async with asyncio.TaskGroup() as waves:
            while True:
                free = await self._buffer.free()
                issued = [self._stream.take() for _ in range(free)]
                for index, _ in issued:
                    self._buffer.reserve(index)
                waves.create_task(self._fill(issued))

    async def _fill(self, issued: Sequence[Issued]) -> None:
        """Dispatch a wave, then what replaces its failures, until none is left."""
        while issued:
            failures: dict[int, RolloutFailure] = {}
            # The sort is stable: either kind is dealt evenly, in order, and so are both together.
            dealt = sorted(issued, key=self._is_searched)
            async with asyncio.TaskGroup() as dispatches:
                for actor in range(self._pool.count):
                    part = dealt[actor :: self._pool.count]
                    sampled = [item for item in part if not self._is_searched(item)]
                    if sampled:
                        dispatches.create_task(self._sample(actor, sampled, failures))
                    for item in part[len(sampled) :]:
                        dispatches.create_task(self._search(actor, item, failures))
            # After the good ones, so that the share does not depend on the order within a wave.
            issued = [self._replace(index, failures[index]) for index, _ in issued if index in failures]

    def _is_searched(self, item: Issued) -> bool:
        return is_searched(item[0], self._search_fraction)

    async def _sample(self, actor: int, issued: Sequence[Issued], failures: dict[int, RolloutFailure]) -> None:
        groups = await self._pool.generate(actor, [prompt for _, prompt in issued], self._settings)
        for (index, _), group in zip(issued, groups, strict=True):
            await self._finish(index, group, failures)

    async def _search(self, actor: int, item: Issued, failures: dict[int, RolloutFailure]) -> None:
        index, prompt = item
        await self._finish(index, await self._pool.search(actor, prompt), failures)

    async def _finish(
        self, index: int, found: TrajectoryGroup | RolloutFailure, failures: dict[int, RolloutFailure]
    ) -> None:
        if isinstance(found, RolloutFailure):
            failures[index] = found
        else:
            self._failures.add(total=1)
            await self._buffer.finish(index, found)

    def _replace(self, index: int, failure: RolloutFailure) -> Issued:
        self._failures.add(failed=1, total=1, detail=failure.reason)
        replacement = self._stream.take()
        self._buffer.replace(index, replacement[0])
        return replacement
