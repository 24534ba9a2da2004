"""The request to end a run: its first reason counts, and it ends a wait at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from rlsys.control.stop_request import StopRequest
from rlsys.errors import EngineError, InterruptedRunError


def run(test: Callable[[StopRequest], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(StopRequest()), 5)

    asyncio.run(main())


def test_without_a_request_work_is_finished() -> None:
    async def test(stop: StopRequest) -> None:
        stop.check()
        assert await stop.wait_for(asyncio.sleep(0, "done")) == "done"

    run(test)


def test_the_first_reason_ends_a_wait_and_cancels_the_work() -> None:
    async def test(stop: StopRequest) -> None:
        work = asyncio.ensure_future(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(stop.request, "SIGINT")
        with pytest.raises(InterruptedRunError, match="^SIGINT$"):
            await stop.wait_for(work)
        await asyncio.wait([work])
        assert work.cancelled()
        stop.request("SIGTERM")
        stop.fail(EngineError("too late"))
        with pytest.raises(InterruptedRunError, match="^SIGINT$"):
            stop.check()

    run(test)


def test_an_error_ends_a_wait_as_itself() -> None:
    async def test(stop: StopRequest) -> None:
        stop.fail(EngineError("actor 1 died"))
        with pytest.raises(EngineError, match="actor 1 died"):
            await stop.wait_for(asyncio.Event().wait())

    run(test)


def test_a_receiver_gets_the_reason_inside_its_block_only() -> None:
    async def test(stop: StopRequest) -> None:
        early, late = [], []
        with stop.calling(early.append):
            await asyncio.sleep(0)
        stop.request("SIGTERM")
        with stop.calling(late.append):
            await asyncio.sleep(0)
        assert (early, late) == ([], ["SIGTERM"])

    run(test)
