"""A fleet over scripted processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from rlsys.control.actor_slots import ActorState
from rlsys.control.fleet import Fleet
from rlsys.control.watchdog import WatchClock
from rlsys.errors import (
    EngineError,
)
from rlsys.interfaces import EngineStats
from rlsys.types import SamplingSettings
from rlsys.weight_types import WeightAck, WeightOffer

SETTINGS = SamplingSettings(samples=1, temperature=1.0, top_p=1.0, max_tokens=4, seed=0)


SERVING, STALE = ActorState.SERVING, ActorState.STALE


class ScriptedPublication:
    """A publication of a learner that has sent everything, unless a test says otherwise.

    Attributes:
        members: processes that were up when it began.
        error: the loss of the learner.
        gate: the learner has not sent everything until it is set.
    """

    serial = False

    def __init__(self, version: int, judge: Callable[[WeightAck], object]) -> None:
        self.offer = WeightOffer(version=version, attempt=0, source=None)
        self.probe: Sequence[Any] = ()
        self.members: list[str] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._judge = judge

    def begin(self, members: Sequence[str]) -> None:
        self.members = list(members)

    @property
    def failed(self) -> bool:
        return self.error is not None

    async def sent(self) -> None:
        await self.gate.wait()
        if self.error:
            raise self.error

    async def check(self, ack: WeightAck) -> None:
        await self.sent()
        self._judge(ack)


class Process:
    """A fake actor process. A test makes its calls succeed, fail or hang."""

    async def score(self, token_ids: Any, tokens: int | None) -> Any:
        """Return the number of the process as every id, with log-probability -1."""
        await self._work("score")
        ids = np.full((len(token_ids) - 1, tokens or 1), self.number, dtype=np.int32)
        return ids, -np.ones(ids.shape, dtype=np.float32)

    def __init__(self, world: World, number: int, attempt: int) -> None:
        self.world, self.number, self.attempt = world, number, attempt
        self.version: int | None = None
        self.steps = 0
        self.started = self.killed = self.closed = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def _work(self, what: str) -> None:
        self.world.calls.append((what, self.number, self.attempt))
        await self.gate.wait()
        if self.killed:
            raise EngineError(f"actor {self.number} died: killed")
        if self.error:
            raise self.error
        self.steps += 1

    async def start(self) -> None:
        await self.world.starting(self)
        await self._work("start")
        self.started = True

    async def generate(self, prompts: Sequence[Any], settings: SamplingSettings) -> Any:
        await self._work("generate")
        if self.world.current is not None:
            assert self.version == self.world.current  # no actor generates with other weights
        return [(each.prompt_id, self.number, self.attempt) for each in prompts]

    async def search(self, each: Any) -> Any:
        return (await self.generate([each], SETTINGS))[0]

    grow = search

    async def probe(self, rows: Sequence[Any]) -> Any:
        await self._work("probe")
        return rows

    async def update_weights(self, offer: WeightOffer, probe: Any) -> WeightAck:
        await self._work("update")
        self.version = offer.version
        return WeightAck(actor=f"{self.number}", version=self.version, probe_logprobs=())

    async def engine_stats(self) -> EngineStats:
        await self._work("engine_stats")
        return EngineStats(busy_s=1.0, wall_s=4.0, in_flight_mean=2.5, generated_tokens=10 * self.attempt + self.number)

    async def progress(self) -> int:
        await self.world.looking.wait()
        if self.killed:
            raise EngineError(f"actor {self.number} died: killed")
        return self.steps

    async def forget(self, caller: str) -> None:
        self.world.forgotten.append((self.number, caller))

    async def close(self) -> None:
        self.closed = True

    def kill(self) -> None:
        self.killed = True
        self.gate.set()


class World:
    """All processes that were ever started, and the calls made to them."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.calls: list[tuple[str, int, int]] = []
        self.said: list[str] = []
        self.forgotten: list[tuple[int, str]] = []  # auxiliary engine, and the lost caller
        self.publications: list[ScriptedPublication] = []
        self.current: int | None = None
        self.now = 0.0
        self.interval_s = 1.0
        self.looking = asyncio.Event()
        self.looking.set()

    async def starting(self, process: Process) -> None: ...

    def spawn(self, number: int, attempt: int) -> Process:
        self.processes.append(Process(self, number, attempt))
        return self.processes[-1]

    def fleet(
        self, count: int = 2, max_restarts: int = 4, auxiliary: Sequence[Any] = (), role: Any = "policy"
    ) -> Fleet:
        return Fleet(
            lambda number, attempt: self.spawn(number, attempt),
            count,
            max_restarts=max_restarts,
            hang_timeout_s=10.0,
            role=role,
            auxiliary=auxiliary,
            say=self.said.append,
            clock=WatchClock(monotonic=lambda: self.now, interval_s=self.interval_s),
        )

    async def publish(self, fleet: Fleet, version: int, judge: Callable[[WeightAck], object] = lambda ack: ack) -> None:
        self.current = version
        self.publications.append(ScriptedPublication(version, judge))
        await fleet.publish(self.publications[-1])


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(World()), 20)

    asyncio.run(main())


async def settle() -> None:
    for _ in range(100):
        await asyncio.sleep(0)
