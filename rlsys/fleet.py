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
import enum
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

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
WATCH_INTERVAL_S = 1.0


class ActorState(enum.Enum):
    """See the picture above."""

    STARTING = "starting"
    STALE = "stale"
    SERVING = "serving"
    DEAD = "dead"


class ActorHandle(Protocol):
    """One actor process. A call raises EngineError or WeightSyncError where the process must not be used again."""

    async def start(self) -> None:
        """Returns when it is up."""
        ...

    async def generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]: ...

    async def search(self, prompt: Prompt) -> TrajectoryGroup | RolloutFailure: ...

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure: ...

    async def probe(self, rows: Sequence[Int32Array]) -> Sequence[Float32Array]: ...

    async def update_weights(
        self, manifest: WeightManifest, references: Sequence[Any], probe: Sequence[Int32Array]
    ) -> WeightAck: ...

    async def usage(self) -> Any:
        """What the engine did since the last call, an actors.usage.EngineUsage."""
        ...

    async def progress(self) -> int:
        """A number that grows with whatever it does. Must be answered while other calls are under way."""
        ...

    async def close(self) -> None: ...

    def kill(self) -> None:
        """End the process at once, also a stopped one."""
        ...


@dataclass(eq=False, slots=True)
class _Member:
    """An incarnation of an actor. progress, since: the last one seen, and when it was new or nothing was asked."""

    number: int
    attempt: int
    handle: ActorHandle
    since: float
    state: ActorState = ActorState.STARTING
    asked: int = 0
    progress: int = -1
    looked_at: bool = False
    cause: RlsysError | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)


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
        max_restarts: lost actors of the whole run that are replaced; one more ends it.
        hang_timeout_s: an actor that was asked something and shows no progress for so long is lost.
        writer: what the actors' own engines are to a tree.
        beside: engines of other models, by what they are to a tree; they are not replaced.
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
        beside: Sequence[tuple[Writer, int, ActorHandle]] = (),
        say: Callable[[str], None] = lambda _text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = count
        self._spawn = spawn
        self._max_restarts = max_restarts
        self._hang_timeout_s = hang_timeout_s
        self._writer = writer
        self._beside = beside
        self._say = say
        self._clock = clock
        self._members: list[_Member] = []
        self._published: _Published | None = None
        self._serves_files = True
        self._updating = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._failed: RlsysError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.restarts = 0

    # --- life ---

    async def __aenter__(self) -> Fleet:
        """Start all actors; returns when all are up.

        Raises:
            RlsysError: one did not start. The first start is no place for replacements: it fails for all alike.
        """
        self._members = [self._incarnation(number, 0) for number in range(self.count)]
        starts = [member.handle.start() for member in self._members] + [each.start() for *_, each in self._beside]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            await self.__aexit__()
            raise
        for member in self._members:
            member.state, member.since = ActorState.SERVING, self._clock()
        self._begin(self._watch())
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        main = asyncio.current_task()
        if main is None or not main.cancelling():  # aborted: the processes are killed at once
            handles = [member.handle for member in self._members] + [handle for *_, handle in self._beside]
            await asyncio.gather(*(handle.close() for handle in handles), return_exceptions=True)

    def states(self) -> list[ActorState]:
        return [member.state for member in self._members]

    # --- what is asked of a serving actor ---

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        """`actor` is asked where it serves, else another one."""
        return await self._issue(actor, lambda handle: handle.generate(prompts, settings))

    async def search(self, actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        return await self._issue(actor, lambda handle: handle.search(prompt))

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        """The finished tree of a prompt."""
        return await self._issue(actor, lambda handle: handle.grow(prompt))

    async def probe(self, actor: int, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        return await self._issue(actor, lambda handle: handle.probe(rows))

    async def search_usage(self) -> list[SearchUsage]:
        """What every engine has done since the last call of this; nothing of actors that are not serving."""
        serving = [member for member in self._members if member.state is ActorState.SERVING]
        own = await asyncio.gather(*(self._usage(member) for member in serving))
        other = await asyncio.gather(*(handle.usage() for *_, handle in self._beside))
        named = [(self._writer, member.number, usage) for member, usage in zip(serving, own, strict=True) if usage]
        named += [(writer, number, usage) for (writer, number, _), usage in zip(self._beside, other, strict=True)]
        return [SearchUsage(model=writer, engine=number, **asdict(usage)) for writer, number, usage in named]

    async def _usage(self, member: _Member) -> Any:
        try:
            return await self._call(member, member.handle.usage())
        except _LostError:
            return None

    async def _issue(self, preferred: int, work: Callable[[ActorHandle], Awaitable[Result]]) -> Result:
        while True:
            member = await self._serving(preferred)
            try:
                return await self._call(member, work(member.handle))
            except _LostError:
                continue

    async def _serving(self, preferred: int) -> _Member:
        """The preferred actor where it serves, else the one that was asked least; waits until there is one."""

        def found() -> _Member | None:
            if self._failed:
                raise self._failed
            serving = [member for member in self._members if member.state is ActorState.SERVING]
            return min(serving, key=lambda member: (member.number != preferred, member.asked), default=None)

        async with self._changed:
            await self._changed.wait_for(found)
            member = found()
        assert member is not None  # noqa: S101 - just waited for
        return member

    async def _call(self, member: _Member, work: Awaitable[Result]) -> Result:
        """The answer of an actor.

        Raises:
            _LostError: it was lost meanwhile, or by this.
        """
        call, lost = asyncio.ensure_future(work), asyncio.ensure_future(member.lost.wait())
        if not member.asked:
            member.since = self._clock()
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
            WeightSyncError: no actor could take it, so another process would not either.
            LearnerLostError: the weights vanished with the rank that had put them there.
            RlsysError: too many actors were lost.
        """
        async with self._updating:
            self._published, self._serves_files = _Published(manifest, references, probe, check), False
            up = [member for member in self._members if member.state in (ActorState.STALE, ActorState.SERVING)]
            for member in up:
                member.state = ActorState.STALE
            await asyncio.gather(*(self._update(member) for member in up))
        causes = [member.cause for member in up]
        for cause in causes:
            if isinstance(cause, LearnerLostError):
                raise cause
        if causes and all(isinstance(cause, WeightSyncError) for cause in causes):
            raise causes[0] or WeightSyncError("no actor could take the weights")
        await self._serving(0)

    async def withdraw(self) -> None:
        """Nobody serves until the next publish: the learner that the present weights came from is no more."""
        async with self._updating:
            self._published = None
            for member in self._members:
                if member.state is ActorState.SERVING and not self._serves_files:
                    member.state = ActorState.STALE

    async def _update(self, member: _Member) -> None:
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
                return
            except WeightSyncError as error:
                self._lose(member, error)
                return
        if member.state is ActorState.STALE:
            member.state = ActorState.SERVING
            await self._tell()

    # --- losing and replacing ---

    def _lose(self, member: _Member, cause: RlsysError) -> None:
        if member.state is ActorState.DEAD:
            return
        member.state, member.cause = ActorState.DEAD, cause
        member.handle.kill()
        member.lost.set()
        self.restarts += 1
        if self.restarts > self._max_restarts:
            self._fail(
                TooManyFailuresError(
                    f"{self.restarts} actors were lost, more than actors.max_restarts = {self._max_restarts}; "
                    f"the last: {cause.message}"
                )
                if self._max_restarts
                else cause
            )
            return
        self._say(f"actor {member.number} is lost and replaced: {cause.message}")
        self._begin(self._replace(member.number, member.attempt + 1))

    async def _replace(self, number: int, attempt: int) -> None:
        member = self._incarnation(number, attempt)
        self._members[number] = member
        try:
            await self._call(member, member.handle.start())
        except _LostError:
            return
        except RlsysError as error:
            self._fail(error)
            return
        member.state, member.since = ActorState.STALE, self._clock()
        async with self._updating:  # a publish that begins meanwhile takes it along
            if member.state is ActorState.STALE:
                await self._update(member)
        if member.state is ActorState.SERVING:
            self._say(f"actor {number} serves again")

    def _incarnation(self, number: int, attempt: int) -> _Member:
        return _Member(number, attempt, self._spawn(number, attempt), self._clock())

    def _fail(self, error: RlsysError) -> None:
        self._failed = self._failed or error
        self._begin(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- watching ---

    async def _watch(self) -> None:
        """By progress: an actor that answers and does nothing hangs, and one that is slow does not."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            for member in self._members:
                if member.state in (ActorState.STALE, ActorState.SERVING):
                    self.look(member)

    def look(self, member: _Member) -> None:
        """Ask for its progress, and judge by what is known."""
        if self._clock() - member.since > self._hang_timeout_s:
            self._lose(
                member,
                EngineError(
                    f"actor {member.number} made no progress within actors.hang_timeout_s = {self._hang_timeout_s} s"
                ),
            )
        elif not member.looked_at:
            member.looked_at = True
            self._begin(self._ask_progress(member))

    async def _ask_progress(self, member: _Member) -> None:
        try:
            found = await member.handle.progress()
        except EngineError as error:
            self._lose(member, error)
            return
        finally:
            member.looked_at = False
        if found != member.progress or not member.asked:
            member.progress, member.since = found, self._clock()
