"""Brings published weights to the actors of a fleet, including those that come up later."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from rlsys.control.actor_slots import ActorSlot, ActorState
from rlsys.errors import LearnerLostError, RlsysError, WeightSyncError
from rlsys.interfaces import Publication
from rlsys.weight_types import WeightAck

REFUSALS = 2  # if so many processes refuse a version and none accepts it, the version is broken


class LostActorError(Exception):
    """The actor of a call was lost before it answered."""


class Supervision(Protocol):
    """The part of `rlsys.control.supervisor.ActorSupervisor` that a publish needs."""

    actors: list[ActorSlot]
    learner_lost: LearnerLostError | None

    async def call(self, slot: ActorSlot, work: Any) -> Any: ...

    def lose(self, slot: ActorSlot, cause: RlsysError) -> None: ...

    def fail(self, error: RlsysError) -> None: ...

    async def notify(self) -> None: ...


class Publisher:
    """Publisher of weight versions to all actors, and later to every replaced actor."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._published: Publication | None = None
        self._serves_files = True
        self._acknowledged = False
        self._refused: list[RlsysError] = []
        self._updating = asyncio.Lock()

    async def publish(self, publication: Publication) -> None:
        """Bring every actor that is up to a new version; actors that come up later get it as well.

        Returns when each of them serves the version or is lost.

        Raises:
            LearnerLostError: the learner was lost before it had sent everything.
        """
        async with self._updating:
            self._published = publication
            self._serves_files = False
            self._acknowledged, self._refused = False, []
            up = [slot for slot in self._supervision.actors if slot.up]
            for slot in up:
                slot.state = ActorState.STALE
            publication.begin([slot.member for slot in up])
            if publication.serial:
                await publication.sent()
            await asyncio.gather(*(self._update(slot) for slot in up))
        await publication.sent()
        for slot in up:
            if isinstance(slot.cause, LearnerLostError):
                raise slot.cause

    async def withdraw(self) -> None:
        """Stop serving until the next publish, because the learner that made the present weights is lost."""
        async with self._updating:
            self._published = self._supervision.learner_lost = None
            for slot in self._supervision.actors:
                if slot.state is ActorState.SERVING and not self._serves_files:
                    slot.state = ActorState.STALE

    def drop(self) -> None:
        """Forget the published weights, because they were lost with the learner."""
        self._published = None

    async def catch_up(self, slot: ActorSlot) -> None:
        """Bring a replaced actor to the published version, unless a publish has already done so."""
        async with self._updating:
            if slot.state is ActorState.STALE:
                await self._update(slot)

    async def _update(self, slot: ActorSlot) -> None:
        """Bring an actor to the current weights, after which it serves them or is lost.

        An actor stays stale if the learner is lost and its weights are gone. The caller holds the lock.
        """
        published = self._published
        if (published is None and not self._serves_files) or (published is not None and published.failed):
            return
        if published is not None:
            try:
                ack = await self._supervision.call(slot, self._load(slot, published))
            except LostActorError:
                self._refuse(slot)
                return
            except LearnerLostError as error:
                self._supervision.lose(slot, error)
                return
            try:
                await published.check(ack)
            except LearnerLostError:  # the engine has all weights of a version that is never served
                return
            except WeightSyncError as error:
                self._supervision.lose(slot, error)
                self._refuse(slot)
                return
        if slot.state is ActorState.STALE:
            slot.state, self._acknowledged = ActorState.SERVING, True
            await self._supervision.notify()

    async def _load(self, slot: ActorSlot, published: Publication) -> WeightAck:
        """Return the acknowledgement of an actor.

        Raises:
            LearnerLostError: the learner was lost meanwhile, so that the actor may wait for it in vain.
        """
        load = asyncio.ensure_future(slot.handle.update_weights(published.offer, published.probe))
        sent = asyncio.ensure_future(published.sent())
        try:
            await asyncio.wait({load, sent}, return_when=asyncio.FIRST_COMPLETED)
            if not load.done():
                await sent
            return await load
        finally:
            for task in (load, sent):
                task.cancel()
            await asyncio.wait({load, sent})

    def _refuse(self, slot: ActorSlot) -> None:
        """Count a process that refused the version, and end the run if all processes so far refused it.

        A single refusal may be the fault of the process.
        """
        if isinstance(slot.cause, WeightSyncError):
            self._refused.append(slot.cause)
        if len(self._refused) >= REFUSALS and not self._acknowledged:
            self._supervision.fail(self._refused[0])
