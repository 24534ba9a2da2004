"""Keeps the buffer's slots filled: prompts out to the actors, groups back into their slots."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence

from rlsys.buffer import Buffer
from rlsys.failures import FailureLimit
from rlsys.interfaces import RolloutPool
from rlsys.prompts import PromptStream
from rlsys.types import Prompt, RolloutFailure, SamplingSettings

Issued = tuple[int, Prompt]


def is_searched(index: int, fraction: float) -> bool:
    """Whether the prompt of a stream index is searched instead of sampled: floor((i + 1) f) > floor(i f).

    So of the first n prompts floor(n f) are searched, evenly spread, and a prompt that is issued again is again.
    """
    return math.floor((index + 1) * fraction) > math.floor(index * fraction)


class Producer:
    """Issues prompts into free slots as soon as there are any.

    All free slots are a wave: dealt over the actors in one dispatch each, so that an engine's first batch does
    not depend on timing; what an actor samples and what it searches are two dispatches, made at once. A failed
    rollout is counted and its slot given to the next prompt, once the whole wave has answered and in order of issue.
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
                    for _, part in itertools.groupby(dealt[actor :: self._pool.count], self._is_searched):
                        dispatches.create_task(self._dispatch(actor, list(part), failures))
            # After the good ones, so that the share does not depend on the order within a wave.
            issued = [self._replace(index, failures[index]) for index, _ in issued if index in failures]

    def _is_searched(self, item: Issued) -> bool:
        return is_searched(item[0], self._search_fraction)

    async def _dispatch(self, actor: int, issued: Sequence[Issued], failures: dict[int, RolloutFailure]) -> None:
        """Have an actor sample, or search, prompts of one kind."""
        prompts = [prompt for _, prompt in issued]
        if self._is_searched(issued[0]):
            groups = await self._pool.search(actor, prompts)
        else:
            groups = await self._pool.generate(actor, prompts, self._settings)
        for (index, _), group in zip(issued, groups, strict=True):
            if isinstance(group, RolloutFailure):
                failures[index] = group
            else:
                self._failures.add(total=1)
                await self._buffer.finish(index, group)

    def _replace(self, index: int, failure: RolloutFailure) -> Issued:
        self._failures.add(failed=1, total=1, detail=failure.reason)
        replacement = self._stream.take()
        self._buffer.replace(index, replacement[0])
        return replacement
