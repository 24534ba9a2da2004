"""Starts the processes of a fleet, watches them, and replaces lost actors within a budget of losses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rlsys.control.actor_slots import ActorHandle, ActorSlot, ActorState, WatchedHandle
from rlsys.control.budgets import causes
from rlsys.control.publisher import LostActorError
from rlsys.control.watchdog import ProgressTimer, WatchClock
from rlsys.errors import (
    AuxiliaryEngineLostError,
    EngineError,
    LearnerLostError,
    RaisedError,
    RlsysError,
    TooManyFailuresError,
    WeightSyncError,
)

Result = TypeVar("Result")
LOSSES_WITHIN_S = 3600.0  # actors.max_restarts limits the losses within this period
MAX_FAILED_STARTS = 5  # so many replacements in a row that do not start end the run, if no actor is up
RETRY_S = 60.0  # between two starts of an actor that does not start while others are up, as when its node is gone

log = logging.getLogger(__name__)


def same_exception(losses: Sequence[RlsysError]) -> bool:
    """Return whether two processes raised the same exception, which a third one would raise too."""
    raised = [loss.exception for loss in losses if isinstance(loss, RaisedError)]
    return len(raised) == 2 and raised[0] == raised[1]


async def _forget(engine: ActorSlot, caller: str) -> None:
    """Let an auxiliary engine abort the requests of a lost actor, which nobody waits for."""
    with contextlib.suppress(EngineError):  # a lost engine is noticed by the watch
        await engine.handle.forget(caller)


class WeightSource(Protocol):
    """The source of the weights that a replaced actor must serve."""

    async def catch_up(self, slot: ActorSlot) -> None:
        """Bring an actor that has just started to the current weights."""
        ...

    def drop(self) -> None:
        """Forget the current weights, because they were lost with the learner."""
        ...


@dataclass(slots=True, kw_only=True)
class LossBudget:
    """Budget of lost actors within an hour, and of replacements in a row that did not start.

    Attributes:
        limit: actors.max_restarts.
    """

    limit: int
    clock: WatchClock
    _losses: deque[tuple[float, RlsysError]] = field(default_factory=deque)
    _failed_starts: list[RlsysError] = field(default_factory=list)

    def lose(self, cause: RlsysError) -> RlsysError | None:
        """Count a loss and return the error that ends the run, if there were too many."""
        now = self.clock.monotonic()
        self._losses.append((now, cause))
        while now - self._losses[0][0] > LOSSES_WITHIN_S:
            self._losses.popleft()
        if len(self._losses) <= self.limit:
            return None
        if not self.limit:
            return cause
        first, count = self._losses[0][1], len(self._losses)
        text = f"{count} actors were lost within an hour, more than actors.max_restarts = {self.limit}"
        return TooManyFailuresError(f"{text}; {causes(first.message, cause.message)}")

    def fail_start(self, cause: RlsysError) -> RlsysError | None:
        """Count a failed start and return the error that ends the run, if there were too many in a row.

        A start may take minutes, which is too long for the limit of losses within an hour. Two starts that raise the
        same exception are enough.
        """
        self._failed_starts.append(cause)
        if len(self._failed_starts) < MAX_FAILED_STARTS and not same_exception(self._failed_starts[-2:]):
            return None
        why = causes(self._failed_starts[0].message, cause.message)
        return TooManyFailuresError(f"{len(self._failed_starts)} actors in a row did not start again; {why}")

    def started(self) -> None:
        """Note that a replacement started."""
        self._failed_starts.clear()


class ActorSupervisor:
    """Supervision of `count` actors, which are replaced, and of auxiliary engines, whose loss ends the run.

    Attributes:
        actors: the present process of every actor, by number.
        restarts: losses of actors so far.
        failed: the error that ends the run.
        learner_lost: set if published weights were lost with the learner.
        changed: notified when a state or `failed` changes.

    Args:
        spawn: starts the process of an actor, by number and attempt, both from 0.
        auxiliary: role, number and handle of each auxiliary engine.
        hang_timeout_s: seconds without progress after which a process counts as hung.
        say: takes a message about every lost actor and every replacement that serves.
    """

    def __init__(
        self,
        spawn: Callable[[int, int], ActorHandle],
        count: int,
        auxiliary: Sequence[tuple[str, int, WatchedHandle]],
        *,
        max_restarts: int,
        hang_timeout_s: float,
        say: Callable[[str], None],
        clock: WatchClock,
    ) -> None:
        self.weights: WeightSource
        self.actors: list[ActorSlot] = []
        self.auxiliary = [
            ActorSlot(f"{name} engine {number}", number, 0, handle, ProgressTimer(clock))
            for name, number, handle in auxiliary
        ]
        self.restarts = 0
        self.failed: RlsysError | None = None
        self.learner_lost: LearnerLostError | None = None
        self.changed = asyncio.Condition()
        self._spawn, self._count = spawn, count
        self._hang_timeout_s = hang_timeout_s
        self._say = say
        self._clock = clock
        self._budget = LossBudget(limit=max_restarts, clock=clock)
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    # --- start and end ---

    async def start(self) -> None:
        """Start all processes; return when each is up, or lost and being replaced.

        Raises:
            RlsysError: no actor started, or one failed for a reason that all share.
        """
        self.actors = [self._new_slot(number, 0) for number in range(self._count)]
        slots = [*self.actors, *self.auxiliary]
        broken = [(slot, error) for slot, error in await asyncio.gather(*map(self._first_start, slots)) if error]
        if broken and (len(broken) == self._count or not self._budget.limit):
            raise broken[0][1]
        for slot in slots:
            slot.state = ActorState.SERVING
            slot.timer.restart()
        for slot, error in broken:
            self.lose(slot, error)
        self._begin(self._watch())

    async def _first_start(self, slot: ActorSlot) -> tuple[ActorSlot, EngineError | None]:
        """Start a process and return its error. The error of an auxiliary engine is raised, as it is not replaced."""
        try:
            await slot.handle.start()
        except EngineError as error:
            if slot not in self.actors:
                raise
            return slot, error
        return slot, None

    async def close(self) -> None:
        """Stop the supervision and close the processes. An aborted run leaves them to be killed with Ray."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        main = asyncio.current_task()
        if main is None or not main.cancelling():
            handles = [slot.handle for slot in [*self.actors, *self.auxiliary]]
            await asyncio.gather(*(handle.close() for handle in handles), return_exceptions=True)

    # --- calls ---

    async def call(self, slot: ActorSlot, work: Awaitable[Result]) -> Result:
        """Return the answer of a process.

        Raises:
            LostActorError: the process was lost meanwhile, or by this call.
        """
        call, lost = asyncio.ensure_future(work), asyncio.ensure_future(slot.lost.wait())
        if not slot.calls:
            slot.timer.restart()
        slot.calls += 1
        try:
            await asyncio.wait({call, lost}, return_when=asyncio.FIRST_COMPLETED)
            if slot.lost.is_set():
                raise LostActorError
            return call.result()
        except AuxiliaryEngineLostError:  # another actor could not ask this engine either
            raise
        except (EngineError, WeightSyncError) as error:
            self.lose(slot, error)
            raise LostActorError from None
        finally:
            slot.calls -= 1
            for task in (call, lost):
                task.cancel()
            await asyncio.wait({call, lost})
            if not call.cancelled():
                call.exception()  # retrieved, so that asyncio does not log an error that no caller waits for

    # --- losing and replacing ---

    def lose(self, slot: ActorSlot, cause: RlsysError) -> None:
        """Kill a process that must not be used again, and replace it if the budget allows it.

        A replacement that does not start counts only while no actor is up.
        """
        if slot.state is ActorState.DEAD:
            return
        not_started = slot.state is ActorState.STARTING
        slot.state, slot.cause = ActorState.DEAD, cause
        slot.lost.set()
        try:
            slot.handle.kill()
        except Exception:
            log.exception("%s is not used again, but could not be killed", slot.who)
        self._begin(self.notify())
        if self._closing:
            return
        if slot not in self.actors:
            self.fail(cause)
            return
        self.restarts += 1
        for engine in self.auxiliary:
            self._begin(_forget(engine, slot.member))
        if isinstance(cause, LearnerLostError):  # not the fault of the actor, so the budget does not count it
            self.weights.drop()
            self.learner_lost = cause
        elif not_started and self._any_up():  # the run goes on without it
            self._say(f"{slot.who} did not start and is tried again in {RETRY_S:.0f} s: {cause.message}")
            self._begin(self._replace(slot.number, slot.attempt + 1, RETRY_S))
            return
        elif error := self._budget.lose(cause):
            self.fail(error)
            return
        self._say(f"{slot.who} is lost and replaced: {cause.message}")
        self._begin(self._replace(slot.number, slot.attempt + 1))

    def _any_up(self) -> bool:
        return any(slot.up for slot in self.actors)

    async def _replace(self, number: int, attempt: int, wait_s: float = 0.0) -> None:
        await asyncio.sleep(wait_s)
        slot = self._new_slot(number, attempt)
        self.actors[number] = slot
        try:
            await self.call(slot, slot.handle.start())
        except LostActorError:
            self._fail_start(slot)
            return
        except RlsysError as error:  # the first process did start, so what is missing now may come back
            self.lose(slot, error)
            self._fail_start(slot)
            return
        self._budget.started()
        slot.state = ActorState.STALE
        slot.timer.restart()
        await self.weights.catch_up(slot)
        if slot.state is ActorState.SERVING:
            self._say(f"{slot.who} serves again")

    def _fail_start(self, slot: ActorSlot) -> None:
        if self._any_up():
            return
        if slot.cause and (error := self._budget.fail_start(slot.cause)):
            self.fail(error)

    def _new_slot(self, number: int, attempt: int) -> ActorSlot:
        handle = self._spawn(number, attempt)
        return ActorSlot(f"actor {number}", number, attempt, handle, ProgressTimer(self._clock))

    def fail(self, error: RlsysError) -> None:
        """End the run with the first error: every call that waits for an actor raises it."""
        self.failed = self.failed or error
        self._begin(self.notify())

    async def notify(self) -> None:
        """Wake the calls that wait for a change of state."""
        async with self.changed:
            self.changed.notify_all()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closing:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End the run if a task of the supervision fails. Otherwise callers would wait forever."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("the supervision of the actors failed", exc_info=error)
        name = f"{type(error).__name__}: {error}"
        self.fail(error if isinstance(error, RlsysError) else EngineError(f"supervision of the actors failed: {name}"))

    # --- watching ---

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._clock.interval_s)
            self.check_progress()

    def check_progress(self) -> None:
        """Lose every process without progress for hang_timeout_s, and ask the others for their progress.

        A process that answers but does no work counts as hung. A slow process that works does not.
        """
        for slot in [*self.actors, *self.auxiliary]:
            if not slot.up:
                continue
            if slot.timer.update() > self._hang_timeout_s:
                limit = f"actors.hang_timeout_s = {self._hang_timeout_s} s"
                self.lose(slot, EngineError(f"{slot.who} made no progress within {limit}"))
            elif not slot.asking_progress:
                slot.asking_progress = True
                self._begin(self._ask_progress(slot))

    async def _ask_progress(self, slot: ActorSlot) -> None:
        try:  # the timeout lets another question follow, so that one lost answer does not look like a hang
            progress = await asyncio.wait_for(slot.handle.progress(), self._hang_timeout_s / 4)
        except TimeoutError:
            return
        except EngineError as error:
            self.lose(slot, error)
            return
        finally:
            slot.asking_progress = False
        # Only actors count as idle: auxiliary engines are called by actors, and report progress while idle.
        slot.timer.report(progress, idle=slot not in self.auxiliary and not slot.calls)
