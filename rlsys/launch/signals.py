"""Stop a command on SIGINT, SIGTERM or run.time_limit, from its first second to its last."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from rlsys.errors import AbortedRunError

Result = TypeVar("Result")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TIME_LIMIT = "run.time_limit"  # used like the name of a signal


class _Stopped(BaseException):
    """Raised by a signal at any point. It is no subclass of Exception, which libraries may catch."""


class StopSignals:
    """End the `with` block by AbortedRunError on a signal. After `ask_first`, the first signal only requests an end.

    Signals are ignored once the work of `run` has ended, because the cleanup that follows ends by itself.

    Args:
        outcome: the end of the message "stopped by SIGINT ...".
        time_limit_s: seconds from now after which an end is requested, under the name run.time_limit. The limit never
            aborts a save, and the signal that follows it still counts as the first.
    """

    def __init__(self, outcome: str = "", time_limit_s: float | None = None) -> None:
        self._outcome = outcome
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._end_requested = False
        self._request_end: Callable[[str], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._aborted: AbortedRunError | None = None
        self._ended = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._received) for number in SIGNALS}
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, _Stopped) and self._aborted is not None:
            raise self._aborted from None

    def ask_first(self, ask: Callable[[str], None], outcome: str) -> None:
        """Make the next signal call `ask` with its name in the event loop, and the one after it abort.

        Args:
            ask: requests an end.
            outcome: the end of the message if the run is aborted.
        """
        self._request_end, self._outcome = ask, outcome

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` in an event loop and return its result. An abort cancels it and raises AbortedRunError."""
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                return runner.run(self._main(work))
        except asyncio.CancelledError:
            if self._aborted is None:
                raise
            raise self._aborted from None

    async def _main(self, work: Coroutine[Any, Any, Result]) -> Result:
        self._task = asyncio.current_task()
        try:
            if self._aborted is not None:  # by a signal after the loop had started
                work.close()
                raise asyncio.CancelledError
            if self._deadline is not None:
                wait = max(0.0, self._deadline - time.monotonic())
                asyncio.get_running_loop().call_later(wait, self._time_is_up)
            return await work
        finally:
            self._ended = True

    def _received(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if self._ended:
            return
        if self._loop is None:
            self._aborted = AbortedRunError(f"{name}{self._outcome}")
            raise _Stopped(name)
        self._loop.call_soon_threadsafe(self._in_loop, name)

    def _in_loop(self, name: str) -> None:
        if self._ended:
            return
        if self._request_end is not None:
            request_end, self._request_end = self._request_end, None
            self._end_requested = True
            request_end(name)
        else:
            self._abort(name)

    def _abort(self, name: str) -> None:
        self._aborted = AbortedRunError(f"{name}{self._outcome}")
        if self._task is not None:
            self._task.cancel()

    def _time_is_up(self) -> None:
        if self._ended or self._end_requested:
            return
        if self._request_end is not None:
            self._request_end(TIME_LIMIT)
        else:  # there is no state to save yet
            self._abort(TIME_LIMIT)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore signals while the block runs. An interrupted cleanup would leave processes behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
