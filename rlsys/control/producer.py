"""Keeps the slots of the buffer filled: issues prompts to the actors and puts their groups into the slots."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from rlsys.config.search import SearchConfig
from rlsys.control.budgets import FailureLimit
from rlsys.control.buffer import Buffer
from rlsys.control.dispatch import Rollout, roll_out
from rlsys.control.dynamic_sampling import GroupFilter
from rlsys.data.prompts import PromptStream
from rlsys.interfaces import RolloutPool
from rlsys.types import Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup

IssuedPrompt = tuple[int, Prompt]
"""A prompt with its index in the stream."""


def is_searched(index: int, fraction: float) -> bool:
    """Return whether the prompt of a stream index is searched: floor((i + 1) f) > floor(i f).

    Of the first n prompts floor(n f) are searched, evenly spread. The index alone decides, so a prompt that is issued
    again gets the same answer.
    """
    return math.floor((index + 1) * fraction) > math.floor(index * fraction)


def is_unsolved(rollout: Rollout) -> bool:
    """Return whether a rollout is a sampled group without a right completion."""
    if isinstance(rollout, RolloutFailure) or rollout.searched:
        return False
    return not any(trajectory.correct for trajectory in rollout.trajectories)


class Producer:
    """Producer of groups: issues prompts into the free slots of the buffer as soon as there are any.

    All slots that are free at once form a wave. After all rollouts of a wave have ended, the slots of failed rollouts
    get the next prompts of the stream, in order of issue. In the first `filtering.rounds` rounds that have any, groups
    without a learning signal are replaced too; after those rounds they are trained. With train.max_staleness 0 a wave
    is a training step, so the replacements do not depend on timing. With more staleness, waves overlap and the wave
    that ends first takes the next prompt. With `search.unsolved`, a prompt that no sample solved keeps its slot and is
    searched in the next round, instead of being replaced. A resumed run issues the prompts in flight as a new wave with
    all its rounds.

    Args:
        failures: counts all rollouts of the run, and ends the run if too many fail.
        search: decides which prompts are searched instead of sampled, and whether an unsolved prompt is searched
            instead of being replaced.
        filtering: decides which groups are replaced, and counts them.
    """

    def __init__(
        self,
        pool: RolloutPool,
        stream: PromptStream,
        buffer: Buffer,
        settings: SamplingSettings,
        failures: FailureLimit,
        search: SearchConfig,
        filtering: GroupFilter,
    ) -> None:
        self._pool = pool
        self._stream = stream
        self._buffer = buffer
        self._settings = settings
        self._failures = failures
        self._search = search
        self._filtering = filtering

    async def run(self) -> None:
        """Issue prompts until cancelled, or until a call raises."""
        async with asyncio.TaskGroup() as waves:
            while True:
                free = await self._buffer.free()
                issued = [self._stream.take() for _ in range(free)]
                for index, _ in issued:
                    self._buffer.reserve(index)
                waves.create_task(self._fill(issued))

    async def _fill(self, issued: Sequence[IssuedPrompt]) -> None:
        """Fill the slots of a wave, in as many rounds of replacements as it takes."""
        rounds, unsolved = self._filtering.rounds, frozenset[int]()
        while issued:
            unused = await self._roll_out(issued, unsolved, filtered=rounds > 0)
            unsolved = frozenset(index for index in unused if self._is_to_search(unused[index]))
            # Failures are counted after the good rollouts, so that their share does not depend on timing in the wave.
            issued = [self._next(each, unused[each[0]], unsolved) for each in issued if each[0] in unused]
            rounds -= any(isinstance(rollout, TrajectoryGroup) for rollout in unused.values())

    async def _roll_out(
        self, issued: Sequence[IssuedPrompt], unsolved: AbstractSet[int], *, filtered: bool
    ) -> dict[int, Rollout]:
        """Roll out prompts into their slots and return the rollouts to replace, by stream index.

        Args:
            unsolved: indices of prompts that no sample solved, and that are searched now.
            filtered: whether groups without a learning signal are replaced.
        """
        unused: dict[int, Rollout] = {}

        async def deliver(position: int, rollout: Rollout) -> None:
            index = issued[position][0]
            if isinstance(rollout, RolloutFailure):
                unused[index] = rollout
                return
            self._failures.add(total=1)
            if filtered and (self._is_to_search(rollout) or not self._filtering.has_signal(rollout)):
                unused[index] = rollout
            else:
                await self._buffer.finish(index, rollout)

        searched = [index in unsolved or is_searched(index, self._search.fraction) for index, _ in issued]
        await roll_out(self._pool, [prompt for _, prompt in issued], searched, self._settings, deliver)
        return unused

    def _is_to_search(self, rollout: Rollout) -> bool:
        return self._search.unsolved and is_unsolved(rollout)

    def _next(self, issued: IssuedPrompt, unused: Rollout, unsolved: AbstractSet[int]) -> IssuedPrompt:
        """Count an unused rollout, and return the prompt for its slot: the same one if it is searched now."""
        index = issued[0]
        if isinstance(unused, RolloutFailure):
            self._filtering.add_failure(unused)
            self._failures.add(failed=1, total=1, details=[unused.reason])
        else:
            self._filtering.add(unused)
        if index in unsolved:
            return issued
        replacement = self._stream.take()
        self._buffer.replace(index, replacement[0])
        return replacement
