"""What SIGINT and SIGTERM do to a command, from its first second to its last."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from rlsys.errors import AbortedRunError

Result = TypeVar("Result")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Inside `with`, a signal raises AbortedRunError; after `ask_first` the first one only asks for an end.

    Args:
        outcome: ends the sentence "stopped by SIGINT ...".
    """

    def __init__(self, outcome: str = "") -> None:
        self._outcome = outcome
        self._ask: Callable[[str], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._aborted: AbortedRunError | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._received) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask_first(self, ask: Callable[[str], None], outcome: str) -> None:
        """From now on the first signal calls `ask` with its name in the event loop; the next one aborts."""
        self._ask, self._outcome = ask, outcome

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """asyncio.run, of which an abort cancels the main task."""
        try:
            return asyncio.run(self._main(work))
        except asyncio.CancelledError:
            if self._aborted is None:
                raise
            raise self._aborted from None

    async def _main(self, work: Coroutine[Any, Any, Result]) -> Result:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            return await work
        finally:
            self._loop = self._task = None

    def _received(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if self._loop is None:
            raise AbortedRunError(f"{name}{self._outcome}")
        self._loop.call_soon_threadsafe(self._in_loop, name)

    def _in_loop(self, name: str) -> None:
        if self._ask is not None:
            ask, self._ask = self._ask, None
            ask(name)
        elif self._task is not None:
            self._aborted = AbortedRunError(f"{name}{self._outcome}")
            self._task.cancel()


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """For a cleanup that takes seconds: cut short, it would leave processes behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
