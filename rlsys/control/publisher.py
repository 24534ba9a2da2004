"""Brings published weights to the actors of a fleet, including those that come up later."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlsys.control.actor_slots import ActorSlot, ActorState
from rlsys.errors import LearnerLostError, RlsysError, WeightSyncError
from rlsys.interfaces import CheckAck, WeightTransfer
from rlsys.types import Int32Array, WeightOffer

REFUSALS = 2  # so many processes that could not take a version, and none that could, blame the version


@dataclass(frozen=True, slots=True)
class _Published:
    """A published version, as a late actor needs it."""

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
            LearnerLostError: the weights vanished with the rank that had put them there.
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
        """Offer the published weights to no further actor: they vanished with the learner."""
        self._published = None

    async def catch_up(self, slot: ActorSlot) -> None:
        """Bring a replaced actor to the published version. A publish that began meanwhile takes it along."""
        async with self._updating:
            if slot.state is ActorState.STALE:
                await self._update(slot)

    async def _update(self, slot: ActorSlot, offer: WeightOffer | None = None) -> None:
        """Leave the actor serving, or lost. The caller holds the lock; a late actor comes without an offer."""
        published = self._published
        if published is None and not self._serves_files:
            return
        if published is not None:
            try:
                offer = offer or await published.transfer.offer_for_late_actor(published.version)
                ack = await self._supervision.call(slot, slot.handle.update_weights(offer, published.probe))
                published.check(ack)
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

    def _refuse(self, slot: ActorSlot) -> None:
        """Count a process that could not take the version; one alone may have been broken itself."""
        if isinstance(slot.cause, WeightSyncError):
            self._refused.append(slot.cause)
        if len(self._refused) >= REFUSALS and not self._acknowledged:
            self._supervision.fail(self._refused[0])
