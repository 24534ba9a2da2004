"""Two sides use a device in turns: never both awake, and no call starves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rlsys.control.shared_device import SharedDevice
from rlsys.errors import EngineError


class Recorded:
    """A process that records when it moves its states, and takes time for it."""

    def __init__(self, name: str, log: list[str], error: Exception | None = None) -> None:
        self.name, self.log, self.error = name, log, error

    async def sleep(self) -> None:
        await self._note("sleeps")

    async def wake(self) -> None:
        await self._note("wakes")

    async def _note(self, text: str) -> None:
        await asyncio.sleep(0.001)
        if self.error:
            error, self.error = self.error, None
            raise error
        self.log.append(f"{self.name} {text}")


def device(log: list[str], error: Exception | None = None) -> SharedDevice:
    found = SharedDevice()
    for number in range(2):
        found.join("engines", Recorded(f"engine {number}", log))
    found.join("learner", Recorded("learner", log, error))
    return found


def test_one_side_sleeps_before_the_other_wakes() -> None:
    log: list[str] = []
    shared = device(log)

    async def work() -> None:
        for side in ("engines", "engines", "learner", "engines"):
            async with shared.use(side):  # type: ignore[arg-type]
                log.append(f"{side} work")

    asyncio.run(work())
    begin = ["learner sleeps", "engine 0 wakes", "engine 1 wakes", "engines work", "engines work"]
    turn = ["engine 0 sleeps", "engine 1 sleeps", "learner wakes", "learner work"]
    assert log == [*begin, *turn, "learner sleeps", "engine 0 wakes", "engine 1 wakes", "engines work"]
    assert shared.changes == 3


def test_calls_of_one_side_run_together_and_never_beside_the_other() -> None:
    shared, active, together = device([]), {"engines": 0, "learner": 0}, []

    async def call(side: Any, delay: float) -> None:
        await asyncio.sleep(delay)
        async with shared.use(side):
            active[side] += 1
            together.append(dict(active))
            await asyncio.sleep(0.01)
            active[side] -= 1

    async def work() -> None:
        await asyncio.gather(*(call("engines", 0.0) for _ in range(3)), *(call("learner", 0.002) for _ in range(2)))

    asyncio.run(work())
    assert max(seen["engines"] for seen in together) == 3
    assert all(0 in seen.values() for seen in together)


def test_a_failed_change_is_raised_and_tried_again_by_the_next_call() -> None:
    log: list[str] = []
    shared = device(log, EngineError("the learner is lost"))

    async def work() -> None:
        with pytest.raises(EngineError, match="the learner is lost"):
            async with shared.use("engines"):
                raise AssertionError("the device is not free")
        assert shared.awake is None
        async with shared.use("engines"):
            log.append("work")

    asyncio.run(work())
    assert log == ["learner sleeps", "engine 0 wakes", "engine 1 wakes", "work"]


def test_a_cancelled_wait_holds_nothing() -> None:
    shared = device([])

    async def work() -> None:
        async with shared.use("engines"):
            waiting = asyncio.create_task(_use(shared))
            await asyncio.sleep(0.005)
            waiting.cancel()
        async with asyncio.timeout(1), shared.use("engines"):
            pass
        async with asyncio.timeout(1), shared.use("learner"):
            pass

    asyncio.run(work())


async def _use(shared: SharedDevice) -> None:
    async with shared.use("learner"):
        pass


def test_a_process_that_has_left_is_not_asked() -> None:
    log: list[str] = []
    shared, late = device(log), Recorded("late", log)
    shared.join("engines", late)
    shared.leave("engines", late)
    shared.leave("engines", late)
    asyncio.run(_use(shared))
    assert log == ["engine 0 sleeps", "engine 1 sleeps", "learner wakes"]
