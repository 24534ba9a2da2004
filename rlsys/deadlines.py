"""Deadlines that a pause of this process does not use up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")
PARTS = 20


async def within(work: Awaitable[Result], timeout_s: float) -> Result:
    """Return the result of `work`.

    The time is counted in `PARTS` equal parts. A pause of this process, by SIGSTOP, a debugger or a suspended machine,
    ends one part at most, however long it is.

    Raises:
        TimeoutError: all parts have passed. `work` is cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        for _ in range(PARTS):
            if (await asyncio.wait({task}, timeout=timeout_s / PARTS))[0]:
                return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
