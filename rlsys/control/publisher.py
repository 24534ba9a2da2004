"""Brings published weights to the actors of a fleet, including those that come up later."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.control.actor_slots import ActorSlot, ActorState
from rlsys.errors import LearnerLostError, RlsysError, WeightSyncError
from rlsys.interfaces import CheckAck, WeightTransfer
from rlsys.types import Int32Array, WeightAck, WeightOffer

REFUSALS = 2  # if so many processes refuse a version and none accepts it, the version is broken


@dataclass(frozen=True, slots=True)
class _Published:
    """A published version, with everything that a late actor needs to load it."""

    version: int
    transfer: WeightTransfer
    probe: Sequence[Int32Array]
    check: CheckAck


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
        self._published: _Published | None = None
        self._serves_files = True
        self._acknowledged = False
        self._refused: list[RlsysError] = []
        self._updating = asyncio.Lock()

    async def publish(
        self, transfer: WeightTransfer, offer: WeightOffer, probe: Sequence[Int32Array], check: CheckAck
    ) -> None:
        """Bring every actor that is up to a new version; actors that come up later get it as well.

        Returns when each of them serves the version or is lost.

        Args:
            transfer: the transport of the offer, for actors that come up later.
            offer: the version that the learner sent.
            probe: rows of token ids that every actor scores with the new weights.
            check: raises WeightSyncError if an acknowledgement is not good enough.

        Raises:
            LearnerLostError: the weights were lost with the rank that had sent them.
        """
        async with self._updating:
            self._published = _Published(offer.manifest.version, transfer, probe, check)
            self._serves_files = False
            self._acknowledged, self._refused = False, []
            up = [slot for slot in self._supervision.actors if slot.up]
            for slot in up:
                slot.state = ActorState.STALE
            await asyncio.gather(*(self._update(slot, offer) for slot in up))
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

    async def _update(self, slot: ActorSlot, offer: WeightOffer | None = None) -> None:
        """Bring an actor to the current weights, after which it serves them or is lost.

        An actor stays stale if the learner is lost and its weights are gone. The caller holds the lock.

        Args:
            offer: the version that the learner sent; None for a late actor, which gets an offer of its own.
        """
        published = self._published
        if published is None and not self._serves_files:
            return
        if published is not None:
            try:
                # The offer is part of the supervised call, so that a transport that hangs cannot hold the lock forever.
                published.check(await self._supervision.call(slot, self._load(slot, published, offer)))
            except LostActorError:
                self._refuse(slot)
                return
            except (LearnerLostError, WeightSyncError) as error:
                self._supervision.lose(slot, error)
                self._refuse(slot)
                return
        if slot.state is ActorState.STALE:
            slot.state, self._acknowledged = ActorState.SERVING, True
            await self._supervision.notify()

    async def _load(self, slot: ActorSlot, published: _Published, offer: WeightOffer | None) -> WeightAck:
        offer = offer or await published.transfer.offer_for_late_actor(published.version)
        return await slot.handle.update_weights(offer, published.probe)

    def _refuse(self, slot: ActorSlot) -> None:
        """Count a process that refused the version, and end the run if all processes so far refused it.

        A single refusal may be the fault of the process.
        """
        if isinstance(slot.cause, WeightSyncError):
            self._refused.append(slot.cause)
        if len(self._refused) >= REFUSALS and not self._acknowledged:
            self._supervision.fail(self._refused[0])
