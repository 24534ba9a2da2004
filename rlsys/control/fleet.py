"""The fleet of rollout actors: who may be asked, who is lost, and how a lost one comes back.

    starting --it is up--> stale --acknowledged the current version--> serving
       ^                     ^---------- a publish begins ----------------+
       |
       +--- its replacement <-- dead: its process died, it hangs, its engine broke or took a publish wrongly

Only a serving actor is asked for anything. What a lost one was asked is asked again, of whoever serves then: draws are
functions of seed, prompt and sample, so the answer is the one that would have come. An engine that failed in a weight
update holds neither version and is never used again. Before the first publish actors serve what they loaded from files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rlsys.control.budgets import causes
from rlsys.control.watchdog import WATCH_INTERVAL_S, ActorHandle, ActorState, Member, Silence, WatchedHandle
from rlsys.errors import (
    EngineError,
    LearnerLostError,
    RlsysError,
    TooManyFailuresError,
    WeightSyncError,
    WriterLostError,
)
from rlsys.trees import SearchUsage, Tree, TreeFailure, Writer
from rlsys.types import (
    Float32Array,
    Int32Array,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    TrajectoryGroup,
    WeightAck,
    WeightManifest,
)

Result = TypeVar("Result")
Check = Callable[[WeightAck], object]
LOSSES_WITHIN_S = 3600.0  # actors.max_restarts are of so long
MAX_LOST_BY_ONE_CALL = 5  # then it is the call that breaks actors
MAX_FAILED_STARTS = 5  # in a row
REFUSALS = 2  # processes that could not take a version, and none that could: another one could not either

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Published:
    manifest: WeightManifest
    references: Sequence[Any]
    probe: Sequence[Int32Array]
    check: Check


class _LostError(Exception):
    """The actor that a call was made to is no more."""


class Fleet:
    """RolloutPool of `count` actors, supervised. Use it as an async context manager.

    Args:
        spawn: starts the process of an actor, by number and attempt, from 0.
        max_restarts: lost actors within an hour that are replaced; one more ends the run.
        hang_timeout_s: an actor that was asked something and shows no progress for so long is lost.
        writer: what the actors' own engines are to a tree.
        beside: engines of other models, by what they are to a tree; the loss of one ends the run.
        say: is told of every loss and of every return.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        spawn: Callable[[int, int], ActorHandle],
        count: int,
        *,
        max_restarts: int,
        hang_timeout_s: float,
        writer: Writer = "policy",
        beside: Sequence[tuple[Writer, int, WatchedHandle]] = (),
        say: Callable[[str], None] = lambda _text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = count
        self._spawn = spawn
        self._max_restarts = max_restarts
        self._hang_timeout_s = hang_timeout_s
        self._writer = writer
        self._say = say
        self._clock = clock
        self._members: list[Member] = []
        self._beside = [
            (writer, number, Member(f"{writer} engine {number}", number, 0, handle, Silence(clock)))
            for writer, number, handle in beside
        ]
        self._published: _Published | None = None
        self._serves_files = True
        self._acknowledged = False
        self._refused: list[RlsysError] = []
        self._learner_lost: LearnerLostError | None = None
        self._updating = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._failed: RlsysError | None = None
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._losses: deque[tuple[float, RlsysError]] = deque()
        self._not_started: list[str] = []  # why replacements did not, in a row
        self.restarts = 0

    # --- life ---

    async def __aenter__(self) -> Fleet:
        """Start all actors; returns when all are up, or lost and being replaced.

        Raises:
            RlsysError: none started, or one for a reason that all have.
        """
        self._members = [self._incarnation(number, 0) for number in range(self.count)]
        everyone = [*self._members, *(member for *_, member in self._beside)]
        try:
            broken = [(member, why) for member, why in await self._started(everyone) if why]
            if broken and (len(broken) == self.count or not self._max_restarts):
                raise broken[0][1]
        except BaseException:
            await self.__aexit__()
            raise
        for member in everyone:
            member.state = ActorState.SERVING
            member.silence.begin()
        for member, why in broken:
            self._lose(member, why)
        self._begin(self._watch())
        return self

    async def _started(self, members: Sequence[Member]) -> list[tuple[Member, EngineError | None]]:
        """Start them, and say which of the actors broke. Engines beside are not replaced."""

        async def start(member: Member) -> tuple[Member, EngineError | None]:
            try:
                await member.handle.start()
            except EngineError as error:
                if member not in self._members:
                    raise
                return member, error
            return member, None

        return await asyncio.gather(*map(start, members))

    async def __aexit__(self, *exception: object) -> None:
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        main = asyncio.current_task()
        if main is None or not main.cancelling():  # aborted: the processes are killed at once
            handles = [member.handle for member in [*self._members, *(member for *_, member in self._beside)]]
            await asyncio.gather(*(handle.close() for handle in handles), return_exceptions=True)

    def states(self) -> list[ActorState]:
        return [member.state for member in self._members]

    # --- what is asked of a serving actor ---

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        """`actor` is asked where it serves, else another one."""
        what = f"sampling of prompts {_named(prompts)}"
        return await self._issue(actor, what, lambda handle: handle.generate(prompts, settings))

    async def search(self, actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        return await self._issue(actor, f"search of prompt {_named([prompt])}", lambda handle: handle.search(prompt))

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        """The finished tree of a prompt."""
        return await self._issue(actor, f"search of prompt {_named([prompt])}", lambda handle: handle.grow(prompt))

    async def probe(self, actor: int, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        return await self._issue(actor, "scoring of probe rows", lambda handle: handle.probe(rows))

    async def search_usage(self) -> list[SearchUsage]:
        """What every engine has done since the last call of this; nothing of actors that are not serving."""
        serving = [member for member in self._members if member.state is ActorState.SERVING]
        own = await asyncio.gather(*(self._usage(member) for member in serving))
        other = await asyncio.gather(*(self._usage(member) for *_, member in self._beside))
        named = [(self._writer, member.number, usage) for member, usage in zip(serving, own, strict=True) if usage]
        named += [
            (writer, number, usage) for (writer, number, _), usage in zip(self._beside, other, strict=True) if usage
        ]
        return [SearchUsage(model=writer, engine=number, **asdict(usage)) for writer, number, usage in named]

    async def _usage(self, member: Member) -> Any:
        try:
            return await self._call(member, member.handle.usage())
        except _LostError:
            return None

    async def _issue(self, preferred: int, what: str, work: Callable[[ActorHandle], Awaitable[Result]]) -> Result:
        lost: list[str] = []  # why, where an actor was
        while True:
            member = await self._serving(preferred)
            try:
                found = await self._call(member, work(member.handle))
                await self._settled(member)
                return found
            except _LostError:
                lost.append(member.cause.message if member.cause else "")
                if len(lost) == MAX_LOST_BY_ONE_CALL:
                    raise TooManyFailuresError(
                        f"{what}: {len(lost)} actors that were asked for it were lost; {causes(lost[0], lost[-1])}"
                    ) from None

    async def _serving(self, preferred: int) -> Member:
        """The preferred actor where it serves, else the one that was asked least; waits until there is one."""

        def found() -> Member | None:
            if self._failed:
                raise self._failed
            serving = [member for member in self._members if member.state is ActorState.SERVING]
            if not serving and self._learner_lost:
                raise self._learner_lost
            return min(serving, key=lambda member: (member.number != preferred, member.asked), default=None)

        async with self._changed:
            await self._changed.wait_for(found)
            member = found()
        assert member is not None  # noqa: S101 - just waited for
        return member

    async def _settled(self, member: Member) -> None:
        """Wait while a publish is under way: the answer may be of weights that are still to be verified.

        Raises:
            _LostError: they were not the right ones.
        """

        def known() -> bool:
            if self._failed:
                raise self._failed
            return member.state in (ActorState.SERVING, ActorState.DEAD)

        async with self._changed:
            await self._changed.wait_for(known)
        if member.state is ActorState.DEAD:
            raise _LostError

    async def _call(self, member: Member, work: Awaitable[Result]) -> Result:
        """The answer of an actor.

        Raises:
            _LostError: it was lost meanwhile, or by this.
        """
        call, lost = asyncio.ensure_future(work), asyncio.ensure_future(member.lost.wait())
        if not member.asked:
            member.silence.begin()
        member.asked += 1
        try:
            await asyncio.wait({call, lost}, return_when=asyncio.FIRST_COMPLETED)
            if member.lost.is_set():
                raise _LostError
            return call.result()
        except WriterLostError:  # another actor could not ask it either
            raise
        except (EngineError, WeightSyncError) as error:
            self._lose(member, error)
            raise _LostError from None
        finally:
            member.asked -= 1
            for task in (call, lost):
                task.cancel()
            await asyncio.wait({call, lost})
            if not call.cancelled():
                call.exception()  # of a call that nobody waits for any more

    # --- publishing ---

    async def publish(
        self, manifest: WeightManifest, references: Sequence[Any], probe: Sequence[Int32Array], check: Check
    ) -> None:
        """Bring every actor that is up to a new version; those that come up later get it as well.

        Returns when all of them serve it or are lost, and at least one serves it.

        Args:
            check: raises WeightSyncError where an acknowledgement is not good enough.
        Raises:
            WeightSyncError: two processes could not take it and none could, so another one would not either.
            LearnerLostError: the weights vanished with the rank that had put them there.
            RlsysError: too many actors were lost.
        """
        async with self._updating:
            self._published, self._serves_files = _Published(manifest, references, probe, check), False
            self._acknowledged, self._refused = False, []
            up = [member for member in self._members if member.state in (ActorState.STALE, ActorState.SERVING)]
            for member in up:
                member.state = ActorState.STALE
            await asyncio.gather(*(self._update(member) for member in up))
        for member in up:
            if isinstance(member.cause, LearnerLostError):
                raise member.cause
        await self._serving(0)

    async def withdraw(self) -> None:
        """Nobody serves until the next publish: the learner that the present weights came from is no more."""
        async with self._updating:
            self._published = self._learner_lost = None
            for member in self._members:
                if member.state is ActorState.SERVING and not self._serves_files:
                    member.state = ActorState.STALE

    async def _update(self, member: Member) -> None:
        """Under the lock. Leaves the member serving, or lost."""
        published = self._published
        if published is None and not self._serves_files:
            return
        if published is not None:
            work = member.handle.update_weights(published.manifest, published.references, published.probe)
            try:
                ack = await self._call(member, work)
                published.check(ack)
            except _LostError:
                self._refuse(member)
                return
            except WeightSyncError as error:
                self._lose(member, error)
                self._refuse(member)
                return
        if member.state is ActorState.STALE:
            member.state, self._acknowledged = ActorState.SERVING, True
            await self._tell()

    def _refuse(self, member: Member) -> None:
        """A process could not take the version that is published; one alone may have been broken itself."""
        if isinstance(member.cause, WeightSyncError):
            self._refused.append(member.cause)
        if len(self._refused) >= REFUSALS and not self._acknowledged:
            self._fail(self._refused[0])

    # --- losing and replacing ---

    def _lose(self, member: Member, cause: RlsysError) -> None:
        if member.state is ActorState.DEAD:
            return
        member.state, member.cause = ActorState.DEAD, cause
        member.lost.set()
        try:
            member.handle.kill()
        except Exception:
            log.exception("%s is not used again, but could not be killed", member.who)
        self._begin(self._tell())
        if self._closing:
            return
        if member not in self._members:
            self._fail(cause)
            return
        self.restarts += 1
        if isinstance(cause, LearnerLostError):  # the actor could not help it; nobody gets these weights any more
            self._published, self._learner_lost = None, cause
        elif self._is_one_too_many(cause):
            return
        self._say(f"{member.who} is lost and replaced: {cause.message}")
        self._begin(self._replace(member.number, member.attempt + 1))

    def _is_one_too_many(self, cause: RlsysError) -> bool:
        """Count a loss; above the limit it is the end."""
        now = self._clock()
        self._losses.append((now, cause))
        while now - self._losses[0][0] > LOSSES_WITHIN_S:
            self._losses.popleft()
        if len(self._losses) <= self._max_restarts:
            return False
        first, count = self._losses[0][1], len(self._losses)
        text = f"{count} actors were lost within an hour, more than actors.max_restarts = {self._max_restarts}"
        text += f"; {causes(first.message, cause.message)}"
        self._fail(TooManyFailuresError(text) if self._max_restarts else cause)
        return True

    async def _replace(self, number: int, attempt: int) -> None:
        member = self._incarnation(number, attempt)
        self._members[number] = member
        try:
            await self._call(member, member.handle.start())
        except _LostError:
            self._did_not_start(member)
            return
        except RlsysError as error:  # the first one did start: what it lacks may come back
            self._lose(member, error)
            self._did_not_start(member)
            return
        self._not_started.clear()
        member.state = ActorState.STALE
        member.silence.begin()
        async with self._updating:  # a publish that begins meanwhile takes it along
            if member.state is ActorState.STALE:
                await self._update(member)
        if member.state is ActorState.SERVING:
            self._say(f"{member.who} serves again")

    def _did_not_start(self, member: Member) -> None:
        """Each may take minutes, too long for the limit of losses within an hour."""
        self._not_started.append(member.cause.message if member.cause else "")
        if len(self._not_started) == MAX_FAILED_STARTS:
            why = causes(self._not_started[0], self._not_started[-1])
            self._fail(TooManyFailuresError(f"{MAX_FAILED_STARTS} actors in a row did not start again; {why}"))

    def _incarnation(self, number: int, attempt: int) -> Member:
        return Member(f"actor {number}", number, attempt, self._spawn(number, attempt), Silence(self._clock))

    def _fail(self, error: RlsysError) -> None:
        self._failed = self._failed or error
        self._begin(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closing:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Supervision that fails must not go unnoticed: callers would wait for ever."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("the supervision of the actors failed", exc_info=error)
        name = f"{type(error).__name__}: {error}"
        self._fail(error if isinstance(error, RlsysError) else EngineError(f"supervision of the actors failed: {name}"))

    # --- watching ---

    async def _watch(self) -> None:
        """By progress: an actor that answers and does nothing hangs, and one that is slow does not."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            for member in [*self._members, *(member for *_, member in self._beside)]:
                if member.state in (ActorState.STALE, ActorState.SERVING):
                    self.look(member)

    def look(self, member: Member) -> None:
        """Ask for its progress, and judge by what is known."""
        if member.silence.look() > self._hang_timeout_s:
            limit = f"actors.hang_timeout_s = {self._hang_timeout_s} s"
            self._lose(member, EngineError(f"{member.who} made no progress within {limit}"))
        elif not member.looked_at:
            member.looked_at = True
            self._begin(self._ask_progress(member))

    async def _ask_progress(self, member: Member) -> None:
        try:  # an answer that got lost must not make it look silent
            found = await asyncio.wait_for(member.handle.progress(), self._hang_timeout_s / 4)
        except TimeoutError:
            return
        except EngineError as error:
            self._lose(member, error)
            return
        finally:
            member.looked_at = False
        actor = member in self._members  # engines beside are asked by actors; their progress goes on while idle
        member.silence.heard(found, idle=actor and not member.asked)


def _named(prompts: Sequence[Prompt]) -> str:
    return ", ".join(prompt.prompt_id for prompt in prompts[:3]) + (", ..." if len(prompts) > 3 else "")
