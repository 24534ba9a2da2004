"""Keeps the buffer's slots filled: prompts out to the actors, groups back into their slots."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlsys.control.budgets import FailureLimit
from rlsys.control.buffer import Buffer
from rlsys.control.dynamic_sampling import GroupFilter
from rlsys.data.prompts import PromptStream
from rlsys.interfaces import RolloutPool
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
    and in order of issue. So are groups without a learning signal, together with the failures, in the first
    `filtering.rounds` rounds in which a wave has any; after those they are trained as they are.
    So with train.max_staleness 0, where a wave is a step, the replacements do not depend on timing either; with more,
    waves overlap and the one that answers first takes the next prompt. What is replaced is decided by the group alone,
    but for the round that its wave is in: a resumed run issues what was in flight as a new wave, with all its rounds.

    Args:
        failures: counts the rollouts of the run, searched ones too, and ends it where too many fail.
        search_fraction: share of the prompts that are searched instead of sampled.
        filtering: decides which groups are replaced, and counts them.
    """

    def __init__(
        self,
        pool: RolloutPool,
        stream: PromptStream,
        buffer: Buffer,
        settings: SamplingSettings,
        failures: FailureLimit,
        search_fraction: float,
        filtering: GroupFilter,
    ) -> None:
        self._pool = pool
        self._stream = stream
        self._buffer = buffer
        self._settings = settings
        self._failures = failures
        self._search_fraction = search_fraction
        self._filtering = filtering

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
        """Dispatch a wave, then what replaces its failures and groups without a signal, until none is left."""
        rounds = self._filtering.rounds
        while issued:
            found = _Found(filtered=rounds > 0)
            # The sort is stable: either kind is dealt evenly, in order, and so are both together.
            dealt = sorted(issued, key=self._is_searched)
            async with asyncio.TaskGroup() as dispatches:
                for actor in range(self._pool.count):
                    part = dealt[actor :: self._pool.count]
                    sampled = [item for item in part if not self._is_searched(item)]
                    if sampled:
                        dispatches.create_task(self._sample(actor, sampled, found))
                    for item in part[len(sampled) :]:
                        dispatches.create_task(self._search(actor, item, found))
            # After the good ones, so that the share does not depend on the order within a wave.
            issued = [self._replace(index, found.unused[index]) for index, _ in issued if index in found.unused]
            rounds -= any(isinstance(unused, TrajectoryGroup) for unused in found.unused.values())

    def _is_searched(self, item: Issued) -> bool:
        return is_searched(item[0], self._search_fraction)

    async def _sample(self, actor: int, issued: Sequence[Issued], found: _Found) -> None:
        groups = await self._pool.generate(actor, [prompt for _, prompt in issued], self._settings)
        for (index, _), group in zip(issued, groups, strict=True):
            await self._finish(index, group, found)

    async def _search(self, actor: int, item: Issued, found: _Found) -> None:
        index, prompt = item
        await self._finish(index, await self._pool.search(actor, prompt), found)

    async def _finish(self, index: int, result: TrajectoryGroup | RolloutFailure, found: _Found) -> None:
        if isinstance(result, RolloutFailure):
            found.unused[index] = result
            return
        self._failures.add(total=1)
        if found.filtered and not self._filtering.has_signal(result):
            found.unused[index] = result
        else:
            await self._buffer.finish(index, result)

    def _replace(self, index: int, unused: TrajectoryGroup | RolloutFailure) -> Issued:
        if isinstance(unused, RolloutFailure):
            self._filtering.add_failure(unused)
            self._failures.add(failed=1, total=1, details=[unused.reason])
        else:
            self._filtering.add(unused)
        replacement = self._stream.take()
        self._buffer.replace(index, replacement[0])
        return replacement


@dataclass(slots=True)
class _Found:
    """What a round of a wave leaves to be replaced, by stream index. filtered: whether groups without a signal are."""

    filtered: bool
    unused: dict[int, TrajectoryGroup | RolloutFailure] = field(default_factory=dict)
