"""What SIGINT, SIGTERM and run.time_limit do to a command, from its first second to its last."""

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
TIME_LIMIT = "run.time_limit"  # in place of a signal's name


class _Stopped(BaseException):
    """What a signal raises wherever the program is. No `except Exception` of a library may take it for its own."""


class StopSignals:
    """A signal ends the `with` block by AbortedRunError; after `ask_first` the first one only asks for an end.

    Once the work of `run` has ended, signals are ignored: what is left is a cleanup that ends by itself.

    Args:
        outcome: ends the sentence "stopped by SIGINT ...".
        time_limit_s: seconds from now after which an end is asked for as by a first signal, under the name
            run.time_limit. It never aborts what is being saved, and the signal that follows it is still the first.
    """

    def __init__(self, outcome: str = "", time_limit_s: float | None = None) -> None:
        self._outcome = outcome
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._asked = False
        self._ask: Callable[[str], None] | None = None
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
        """From now on the first signal calls `ask` with its name in the event loop; the next one aborts."""
        self._ask, self._outcome = ask, outcome

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """asyncio.run, of which an abort cancels the main task."""
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
            if self._aborted is not None:  # between the start of the loop and this
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
        if self._ask is not None:
            ask, self._ask = self._ask, None
            self._asked = True
            ask(name)
        else:
            self._abort(name)

    def _abort(self, name: str) -> None:
        self._aborted = AbortedRunError(f"{name}{self._outcome}")
        if self._task is not None:
            self._task.cancel()

    def _time_is_up(self) -> None:
        if self._ended or self._asked:
            return
        if self._ask is not None:
            self._ask(TIME_LIMIT)
        else:  # nothing has begun that could be saved
            self._abort(TIME_LIMIT)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """For a cleanup that takes seconds: cut short, it would leave processes behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
