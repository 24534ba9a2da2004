"""Devices that engines and learner use in turns: one side sleeps, its states in host memory, while the other works.

    engines work --the learner is called--> engines sleep, learner wakes --an engine is called--> learner sleeps, ...

Calls of one side run at the same time. A call of the other side waits until they have ended, and then the sides change.
A side that has never been called holds no device memory, so both begin asleep.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Literal, Protocol

Side = Literal["engines", "learner"]


class Sleeper(Protocol):
    """A process, or several, that can move its states between device and host."""

    async def sleep(self) -> None:
        """Move all states to the host."""
        ...

    async def wake(self) -> None:
        """Move all states back to the device."""
        ...


class SharedDevice:
    """The devices of a run, which belong to one side at a time.

    Attributes:
        awake: the side that holds the devices; None before the first call.
        changes: number of changes of the side so far.
    """

    def __init__(self) -> None:
        self.awake: Side | None = None
        self.changes = 0
        self._members: dict[Side, list[Sleeper]] = {"engines": [], "learner": []}
        self._users: Counter[Side] = Counter()
        self._changed = asyncio.Condition()

    def join(self, side: Side, member: Sleeper) -> None:
        """Add a process to a side.

        A process that holds device memory may join only while its side is awake.
        """
        self._members[side].append(member)

    def leave(self, side: Side, member: Sleeper) -> None:
        """Remove a process that has ended."""
        if member in self._members[side]:
            self._members[side].remove(member)

    @contextlib.asynccontextmanager
    async def use(self, side: Side) -> AsyncIterator[None]:
        """Hold the devices for a side inside the block.

        Raises:
            RlsysError: a process could not sleep or wake.
        """
        other: Side = "learner" if side == "engines" else "engines"
        async with self._changed:
            await self._changed.wait_for(lambda: not self._users[other])
            if self.awake != side:
                await self._change(other, side)
            self._users[side] += 1
        try:
            yield
        finally:
            self._users[side] -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _change(self, sleeping: Side, waking: Side) -> None:
        """Let one side sleep, then wake the other. On an error nobody counts as awake: the next call tries again."""
        self.awake = None
        await asyncio.gather(*(member.sleep() for member in list(self._members[sleeping])))
        await asyncio.gather(*(member.wake() for member in list(self._members[waking])))
        self.awake = waking
        self.changes += 1
