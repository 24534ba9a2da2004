"""Slots of groups, which are reserved, finished, taken and released in this order.

There are (max_staleness + 1) * groups_per_step slots. A prompt is issued only into a free slot. A step takes the
oldest groups_per_step slots that no step has taken, and they become free only when the weights of the step are
published, which may be during the next step. So a prompt that is issued at version v is trained, at the latest, by the
step that makes version v + max_staleness + 1, and its staleness is at most max_staleness. With max_staleness 0 every
group is sampled from the newest weights.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import islice

from rlsys.types import TrajectoryGroup


@dataclass(slots=True)
class _Slot:
    index: int
    group: TrajectoryGroup | None = None
    taken: bool = False


class Buffer:
    """First-in-first-out queue of slots, for one asyncio loop.

    Consumes stream indices and groups. `free` waits for a free slot, which `release` provides. `take` waits for the
    oldest groups that no step has taken, which `finish` provides.

    Attributes:
        taken: stream indices of the groups that were taken last.
    """

    def __init__(self, groups_per_step: int, max_staleness: int) -> None:
        self.capacity = (max_staleness + 1) * groups_per_step
        self._groups_per_step = groups_per_step
        self._slots: deque[_Slot] = deque()
        self._unfinished: dict[int, _Slot] = {}  # by stream index
        self._unused: list[int] = []
        self.taken: list[int] = []
        self._changed = asyncio.Condition()

    async def free(self) -> int:
        """Wait until slots are free, and return their number."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._slots) < self.capacity)
            return self.capacity - len(self._slots)

    def reserve(self, index: int) -> None:
        """Reserve a free slot for the prompt of a stream index."""
        if len(self._slots) >= self.capacity:
            raise RuntimeError(f"reserve without a free slot: {self.capacity} of {self.capacity} are taken")
        slot = _Slot(index)
        self._slots.append(slot)
        self._unfinished[index] = slot

    def replace(self, unused: int, index: int) -> None:
        """Give the slot of a prompt without a usable rollout to another prompt; it keeps its place in the queue."""
        slot = self._unfinished.pop(unused)
        slot.index = index
        self._unfinished[index] = slot
        self._unused.append(unused)

    def take_unused(self) -> list[int]:
        """Return the stream indices that were replaced since the last call."""
        unused, self._unused = self._unused, []
        return unused

    async def finish(self, index: int, group: TrajectoryGroup) -> None:
        """Put a group into the slot of its stream index."""
        async with self._changed:
            self._unfinished.pop(index).group = group
            self._changed.notify_all()

    async def take(self) -> list[TrajectoryGroup]:
        """Wait until the oldest groups_per_step slots are finished, and return their groups in order of issue."""
        async with self._changed:
            await self._changed.wait_for(self._next_are_finished)
            slots = self._next()
            for slot in slots:
                slot.taken = True
            self.taken = [slot.index for slot in slots]
            return [slot.group for slot in slots if slot.group is not None]

    async def release(self) -> None:
        """Free the slots of the oldest step that has taken some, if any."""
        async with self._changed:
            for _ in range(self._groups_per_step if self._slots and self._slots[0].taken else 0):
                self._slots.popleft()
            self._changed.notify_all()

    def in_flight(self) -> tuple[int, ...]:
        """Return the stream indices that were issued and not taken, in order. A resumed run issues them again."""
        return tuple(slot.index for slot in self._slots if not slot.taken)

    def _next(self) -> list[_Slot]:
        """Return the slots of the next step, as far as they are reserved."""
        waiting = (slot for slot in self._slots if not slot.taken)
        return list(islice(waiting, self._groups_per_step))

    def _next_are_finished(self) -> bool:
        slots = self._next()
        return len(slots) == self._groups_per_step and all(slot.group is not None for slot in slots)
