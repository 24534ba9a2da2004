"""A deadline that a pause of this process does not use up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from rlsys.deadlines import within

STOPPED = """
import asyncio, os, signal, sys
from rlsys.deadlines import within

async def main():
    print("begins", flush=True)
    return await within(asyncio.sleep(0.5, "answered"), 1.0)

print(asyncio.run(main()))
"""


def test_the_result_and_the_error_of_the_work() -> None:
    async def broken() -> None:
        raise ValueError("broken")

    assert asyncio.run(within(asyncio.sleep(0, 7), 1.0)) == 7
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(within(broken(), 1.0))


def test_work_that_takes_too_long_is_cancelled() -> None:
    async def main() -> bool:
        work = asyncio.create_task(asyncio.sleep(60))
        with pytest.raises(TimeoutError):
            await within(work, 0.01)
        return work.cancelled()

    assert asyncio.run(main())


def test_a_cancelled_wait_cancels_the_work() -> None:
    async def main() -> bool:
        work = asyncio.create_task(asyncio.sleep(60))
        waiting = asyncio.create_task(within(work, 60.0))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        return work.cancelled() and waiting.cancelled()

    assert asyncio.run(main())


def test_a_block_of_the_event_loop_ends_one_part_only() -> None:
    async def main() -> str:
        work = asyncio.create_task(asyncio.sleep(0.3, "answered"))
        waiting = asyncio.create_task(within(work, 0.2))
        await asyncio.sleep(0.01)
        time.sleep(0.25)
        return await waiting

    assert asyncio.run(main()) == "answered"


@pytest.mark.heavy
def test_a_stopped_process_still_waits_for_its_answer() -> None:
    """It is stopped for longer than its deadline."""
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        process.send_signal(19)
        time.sleep(1.5)
        process.send_signal(18)
        assert process.stdout.read() == "answered\n"
