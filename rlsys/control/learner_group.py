"""Calls to all learner ranks. Every rank must answer, and all ranks are watched during a call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rlsys.control.watchdog import ProgressTimer, WatchClock
from rlsys.errors import (
    CheckpointError,
    EngineError,
    InputError,
    LearnerLostError,
    LearnerRaisedError,
    NonFiniteLossError,
    ProcessDiedError,
    RaisedError,
)

log = logging.getLogger(__name__)
FIRST_CAUSE_S = 3.0  # after this time the death of a rank that broke the others is known
ROLLED_BACK = (NonFiniteLossError, CheckpointError)
"""Errors that leave the learner in its state before the call, if all ranks raise them."""


class RankHandle(Protocol):
    """One learner rank. A call has a deadline, and raises EngineError or the error of the rank."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """Return the answer of the rank to a call."""
        ...

    async def progress(self, timeout_s: float) -> int:
        """Return a number that grows with every piece of work. The rank answers while another call is under way."""
        ...

    def kill(self) -> None:
        """End the process at once, even a stopped one."""
        ...


class LearnerGroup:
    """All ranks of the learner. A failure of one rank is the failure of all.

    Args:
        spawn: starts the processes of all ranks, by attempt, from 0.
        hang_timeout_s: seconds without progress after which a rank counts as hung.
        first_cause_s: seconds to wait, after the first error, for the error that caused it.
    """

    def __init__(
        self,
        spawn: Callable[[int], Sequence[RankHandle]],
        *,
        hang_timeout_s: float,
        clock: WatchClock | None = None,
        first_cause_s: float = FIRST_CAUSE_S,
    ) -> None:
        self.restarts = 0
        self._spawn = spawn
        self._hang_timeout_s = hang_timeout_s
        self._clock = clock or WatchClock()
        self._first_cause_s = first_cause_s
        self._call: tuple[str, float] | None = None  # the call under way, and monotonic seconds at its beginning
        self._ranks = spawn(0)

    def restart(self) -> None:
        """Kill all ranks and start new ones, which have no state."""
        for number, rank in enumerate(self._ranks):
            try:
                rank.kill()
            except Exception:  # the other ranks must end too
                log.exception("learner rank %d could not be ended", number)
        self.restarts += 1
        self._ranks = self._spawn(self.restarts)

    async def call(self, method: str, *arguments: Any, moving: bool = False) -> list[Any]:
        """Return the answers of all ranks to a call, and watch the ranks meanwhile.

        Args:
            moving: whether the progress of a rank must grow; otherwise a rank must only report it.
        Raises:
            LearnerLostError: a rank died, broke or hangs, or the ranks raised different errors.
            RlsysError: the error that all ranks raised.
        """
        self._call = (method, self._clock.monotonic())
        work = asyncio.create_task(self.answers(method, *arguments))
        watch = asyncio.create_task(self._watch(moving))
        try:
            await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await watch
            return await work
        finally:
            for task in (watch, work):
                task.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)
            self._call = None

    def activity(self) -> dict[str, Any]:
        """Return the name and the seconds of the call under way; nothing between two calls."""
        return {"call": self._call[0], "seconds": self._clock.monotonic() - self._call[1]} if self._call else {}

    async def answers(self, method: str, *arguments: Any) -> list[Any]:
        """Return the answers of all ranks to a call, without a watch."""
        calls = [asyncio.create_task(rank.call(method, *arguments)) for rank in self._ranks]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            if all(call.done() and not call.exception() for call in calls):
                return [call.result() for call in calls]
            raise await self._choose_error(calls)
        finally:
            for call in calls:
                call.cancel()

    async def _choose_error(self, calls: Sequence[asyncio.Task[Any]]) -> BaseException:
        """Return the error to raise after a rank has failed.

        After a rollback all ranks report the same kind of error, one after the other. If a rank dies, the other ranks
        fail too and may report first. So the death of a rank has precedence over other errors that arrive soon.
        """
        first = next(error for call in calls if call.done() and (error := call.exception()))
        rolled_back = isinstance(first, ROLLED_BACK)
        await asyncio.wait(calls, timeout=self._hang_timeout_s if rolled_back else self._first_cause_s)
        errors = [error for call in calls if call.done() and (error := call.exception())]
        if refused := next((error for error in errors if isinstance(error, InputError)), None):
            return refused  # the other ranks wait for the one that refuses
        if rolled_back and all(isinstance(error, type(first)) for error in errors) and len(errors) == len(calls):
            return first
        error = min(errors, key=lambda each: (not isinstance(each, ProcessDiedError), isinstance(each, ROLLED_BACK)))
        if isinstance(error, RaisedError):
            return LearnerRaisedError(error.message, error.exception)
        if isinstance(error, EngineError):
            return LearnerLostError(error.message)
        return LearnerLostError(f"one rank rolled back and another did not: {error}") if rolled_back else error

    async def _watch(self, moving: bool) -> None:
        """Raise LearnerLostError once a rank shows no progress for hang_timeout_s."""
        limit = self._hang_timeout_s
        timers = [ProgressTimer(self._clock) for _ in self._ranks]
        questions: dict[int, asyncio.Task[None]] = {}

        async def ask(number: int) -> None:
            with contextlib.suppress(EngineError):  # the call itself raises the death of a rank
                timers[number].report(await self._ranks[number].progress(limit / 4), idle=not moving)

        try:
            while True:
                for number in range(len(timers)):
                    if number not in questions or questions[number].done():
                        questions[number] = asyncio.create_task(ask(number))
                await asyncio.sleep(self._clock.interval_s)
                seconds = [timer.update() for timer in timers]
                if max(seconds) > limit:
                    # Ranks that wait for a stopped one make no progress either, but they answer.
                    number = max(range(len(seconds)), key=lambda each: (not questions[each].done(), seconds[each]))
                    raise LearnerLostError(
                        f"learner rank {number} made no progress within learner.hang_timeout_s = {limit} s"
                    )
        finally:
            for task in questions.values():
                task.cancel()
