"""The request to end a run before its last step. It also ends long waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from rlsys.errors import InterruptedRunError

Result = TypeVar("Result")


class StopRequest:
    """Request to end a run, with the first reason: the name of a signal, or an error.

    It must be created inside a running event loop.
    """

    def __init__(self) -> None:
        self._reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def request(self, reason: str) -> None:
        """Ask for an orderly end. Only the first reason counts."""
        if not self._reason.done():
            self._reason.set_result(reason)

    def fail(self, error: BaseException) -> None:
        """End the run with an error, unless an end was asked for before."""
        if not self._reason.done():
            self._reason.set_exception(error)

    def check(self) -> None:
        """Raise if an end was asked for.

        Raises:
            InterruptedRunError: the run shall end; the message is the reason.
            BaseException: the error that `fail` took.
        """
        if self._reason.done():
            raise InterruptedRunError(self._reason.result())

    async def wait_for(self, work: Awaitable[Result]) -> Result:
        """Return the result of `work`, or raise as `check` does as soon as an end is asked for."""
        future = asyncio.ensure_future(work)
        waiting: list[asyncio.Future[Any]] = [future, self._reason]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._reason.done():
            future.cancel()
        self.check()
        return future.result()

    @contextlib.contextmanager
    def calling(self, receive: Callable[[str], None]) -> Iterator[None]:
        """Call `receive` with the reason if an end is requested in the with block, or was requested before."""

        def done(reason: asyncio.Future[str]) -> None:
            if not reason.cancelled():
                receive(reason.result())

        self._reason.add_done_callback(done)
        try:
            yield
        finally:
            self._reason.remove_done_callback(done)
