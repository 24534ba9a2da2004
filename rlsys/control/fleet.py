"""The fleet of rollout actors: it assigns calls to actors and replaces lost actors.

    starting --it is up--> stale --acknowledged the current version--> serving
       ^                     ^---------- a publish begins ----------------+
       |
       +--- its replacement <-- dead: its process died, it hangs, its engine broke, or it failed a publish

Only a serving actor gets calls. The calls of a lost actor are repeated on another actor: draws are functions of seed,
prompt and sample, so the answer is the same. An engine that failed in a weight update holds neither version and is
never used again. Before the first publish, actors serve the weights that they loaded from files.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rlsys.control.actor_slots import ActorHandle, ActorSlot, ActorState, WatchedHandle
from rlsys.control.budgets import causes
from rlsys.control.publisher import LostActorError, Publisher
from rlsys.control.supervisor import ActorSupervisor, same_exception
from rlsys.control.watchdog import WatchClock, watch_interval
from rlsys.errors import EngineError, RlsysError, TooManyFailuresError
from rlsys.interfaces import EngineStats, Publication
from rlsys.sequences import teacher_tokens
from rlsys.trees import Role, Tree, TreeFailure
from rlsys.types import (
    Demonstration,
    Float32Array,
    Int32Array,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    TrajectoryGroup,
)

Result = TypeVar("Result")
MAX_LOST_BY_ONE_CALL = 5  # so many lost actors show that the call itself breaks them


class Fleet:
    """RolloutPool of `count` supervised actors. Use it as an async context manager.

    Args:
        spawn: starts the process of an actor, by number and attempt, both from 0.
        max_restarts: lost actors within an hour that are replaced; one more ends the run.
        hang_timeout_s: seconds without progress after which an actor with calls under way is lost.
        role: the role of the actors' own engines in a tree.
        auxiliary: role, number and handle of the auxiliary engines; the loss of one ends the run.
        say: takes a message about every lost actor and every replacement that serves.
        clock: the clock of the watch.
    """

    def __init__(
        self,
        spawn: Callable[[int, int], ActorHandle],
        count: int,
        *,
        max_restarts: int,
        hang_timeout_s: float,
        role: Role = "policy",
        auxiliary: Sequence[tuple[Role, int, WatchedHandle]] = (),
        say: Callable[[str], None] = lambda _text: None,
        clock: WatchClock | None = None,
    ) -> None:
        self.count = count
        self._role = role
        self._auxiliary_roles = [role for role, *_ in auxiliary]
        self._supervisor = ActorSupervisor(
            spawn,
            count,
            auxiliary,
            max_restarts=max_restarts,
            hang_timeout_s=hang_timeout_s,
            say=say,
            clock=clock or WatchClock(interval_s=watch_interval(count + len(auxiliary))),
        )
        self._publisher = Publisher(self._supervisor)
        self._supervisor.weights = self._publisher

    async def __aenter__(self) -> Fleet:
        """Start all processes; return when each is up, or lost and being replaced.

        Raises:
            RlsysError: no actor started, or one failed for a reason that all share.
        """
        try:
            await self._supervisor.start()
        except BaseException:
            await self._supervisor.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._supervisor.close()

    @property
    def restarts(self) -> int:
        """Losses of actors so far."""
        return self._supervisor.restarts

    @property
    def handles(self) -> list[Any]:
        """The handle of the present process of every actor."""
        return [slot.handle for slot in self._supervisor.actors]

    def states(self) -> list[ActorState]:
        """Return the state of every actor."""
        return [slot.state for slot in self._supervisor.actors]

    def activity(self) -> list[dict[str, Any]]:
        """Return name, state, calls under way and seconds without progress of every process."""
        slots = [*self._supervisor.actors, *self._supervisor.auxiliary]
        return [
            {"name": s.who, "state": s.state.value, "calls": s.calls, "silent_s": s.timer.seconds if s.calls else 0.0}
            for s in slots
        ]

    def check_progress(self) -> None:
        """Check the progress of all processes now, as the watch does in every interval."""
        self._supervisor.check_progress()

    # --- calls of a serving actor ---

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        """Return a group or failure for every prompt, in order. Another actor answers if `actor` does not serve."""
        description = f"sampling of prompts {_names(prompts)}"
        return await self._issue(actor, description, lambda handle: handle.generate(prompts, settings))

    async def search(self, actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        """Return the searched group of a prompt, or the failure with its reason."""
        return await self._issue(actor, f"search of prompt {_names([prompt])}", lambda handle: handle.search(prompt))

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        """Return the finished tree of a prompt."""
        return await self._issue(actor, f"search of prompt {_names([prompt])}", lambda handle: handle.grow(prompt))

    async def probe(self, actor: int, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        """Return the log-probabilities of given rows."""
        return await self._issue(actor, "scoring of probe rows", lambda handle: handle.probe(rows))

    async def score_rows(self, rows: Sequence[Demonstration], tokens: int | None) -> list[Demonstration]:
        """Return rows with the scores of the teacher's engines, which take the rows in turn.

        Raises:
            RlsysError: an engine of the teacher was lost, or refused a row.
        """
        supervisor = self._supervisor
        engines = zip(self._auxiliary_roles, supervisor.auxiliary, strict=True)
        slots = itertools.cycle([slot for role, slot in engines if role == "teacher"])
        calls = [
            supervisor.call(slot, slot.handle.score(row.token_ids, tokens))
            for row, slot in zip(rows, slots, strict=False)
        ]
        try:
            scores = await asyncio.gather(*calls)
        except LostActorError:
            raise supervisor.failed or EngineError("an engine of the teacher was lost") from None
        pairs = zip(rows, scores, strict=True)
        return [replace(row, teacher=teacher_tokens(row.loss_mask, *tokens_of_row)) for row, tokens_of_row in pairs]

    async def engine_stats(self) -> list[EngineStats]:
        """Return the work of every engine since the last call of this method or of `reset_engine_stats`.

        Engines of actors that start or are lost are left out.
        """
        actors = [slot for slot in self._supervisor.actors if slot.up]
        slots = [*actors, *self._supervisor.auxiliary]
        roles = [self._role] * len(actors) + self._auxiliary_roles
        measured = zip(roles, slots, await asyncio.gather(*map(self._engine_stats, slots)), strict=True)
        return [replace(stats, model=role, engine=slot.number) for role, slot, stats in measured if stats]

    async def reset_engine_stats(self) -> None:
        """Start a new interval of `engine_stats`."""
        await self.engine_stats()

    async def _engine_stats(self, slot: ActorSlot) -> EngineStats | None:
        try:
            return await self._supervisor.call(slot, slot.handle.engine_stats())
        except LostActorError:
            return None

    async def _issue(
        self, preferred: int, description: str, work: Callable[[ActorHandle], Awaitable[Result]]
    ) -> Result:
        """Return the answer of the first actor that survives the call and the verification of its weights."""
        losses: list[RlsysError] = []
        while True:
            slot = await self._serving(preferred)
            try:
                result = await self._supervisor.call(slot, work(slot.handle))
                await self._verified(slot)
                return result
            except LostActorError:
                losses.append(slot.cause or EngineError(""))
                if len(losses) == MAX_LOST_BY_ONE_CALL or same_exception(losses[-2:]):
                    raise TooManyFailuresError(
                        f"{description}: {len(losses)} actors were lost during this call; "
                        f"{causes(losses[0].message, losses[-1].message)}"
                    ) from None

    async def _serving(self, preferred: int) -> ActorSlot:
        """Wait for a serving actor. Return the preferred actor, or else the one with the fewest calls."""
        supervisor = self._supervisor

        def choose() -> ActorSlot | None:
            if supervisor.failed:
                raise supervisor.failed
            serving = [slot for slot in supervisor.actors if slot.state is ActorState.SERVING]
            if not serving and supervisor.learner_lost:
                raise supervisor.learner_lost
            return min(serving, key=lambda slot: (slot.number != preferred, slot.calls), default=None)

        async with supervisor.changed:
            await supervisor.changed.wait_for(choose)
            slot = choose()
        assert slot is not None  # noqa: S101 - just waited for
        return slot

    async def _verified(self, slot: ActorSlot) -> None:
        """Wait until the actor serves verified weights: a publish may have changed them during the call.

        Raises:
            LostActorError: the actor was lost, for example because its weights failed the verification.
        """
        supervisor = self._supervisor

        def settled() -> bool:
            if supervisor.failed:
                raise supervisor.failed
            return slot.state in (ActorState.SERVING, ActorState.DEAD)

        async with supervisor.changed:
            await supervisor.changed.wait_for(settled)
        if slot.state is ActorState.DEAD:
            raise LostActorError

    # --- weights ---

    async def publish(self, publication: Publication) -> None:
        """Bring every actor that is up to a new version.

        Returns when every one of them serves it or is lost, and at least one actor serves it.

        Raises:
            WeightSyncError: two processes refused the version and no process accepted it.
            LearnerLostError: the learner was lost before it had sent everything.
            RlsysError: too many actors were lost.
        """
        await self._publisher.publish(publication)
        await self._serving(0)

    async def withdraw(self) -> None:
        """Stop serving until the next publish, because the learner that made the present weights is lost."""
        await self._publisher.withdraw()


def _names(prompts: Sequence[Prompt]) -> str:
    return ", ".join(prompt.prompt_id for prompt in prompts[:3]) + (", ..." if len(prompts) > 3 else "")
