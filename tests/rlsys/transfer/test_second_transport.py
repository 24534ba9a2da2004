"""Another transport under the same bus and fleet: weights through TCP sockets, from one sender to two receivers.

The learner and the actors are small torch models, so the tensors, checksums and probe comparisons are real.
"""

from __future__ import annotations

import asyncio
import pickle
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.weights import check_names
from rlsys.config.schema import WeightSyncConfig
from rlsys.control.actor_slots import ActorState
from rlsys.control.fleet import Fleet
from rlsys.control.weights import WeightBus
from rlsys.errors import EngineError, WeightSyncError
from rlsys.transfer.wire import pack, verified_tensors
from rlsys.types import Float32Array, Int32Array, WeightAck, WeightManifest, WeightOffer

HOST, TICKET_BYTES, BUCKET_BYTES = "127.0.0.1", 16, 100
PROBE = (np.array([1, 5, 2, 7], dtype=np.int32), np.array([3, 4], dtype=np.int32))


class SocketSender:
    """WeightSender that serves the buckets of a version to everyone who shows a ticket of it.

    A ticket admits a fixed number of connections. So an offer is used up when every actor has it, and an actor that
    comes late needs another one.
    """

    def __init__(self, receivers: int) -> None:
        self.receivers = receivers
        self.repeated: list[int] = []
        self.damaged_connections = 0
        self.versions: dict[int, tuple[WeightManifest, list[np.ndarray]]] = {}
        self._tickets: dict[bytes, tuple[int, int]] = {}  # version, and connections that are left
        self._server = socket.create_server((HOST, 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def send(self, tensors: Iterator[tuple[str, Tensor]], *, version: int, attempt: int) -> WeightOffer:
        packed = list(pack(tensors, BUCKET_BYTES))
        manifest = WeightManifest(version=version, attempt=attempt, buckets=tuple(bucket for bucket, _ in packed))
        self.versions[version] = manifest, [data for _, data in packed]
        return self._offer(version, self.receivers)

    def repeat(self, version: int) -> WeightOffer:
        self.repeated.append(version)
        return self._offer(version, 1)

    def close(self) -> None:
        self._server.close()

    def _offer(self, version: int, connections: int) -> WeightOffer:
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = version, connections
        return WeightOffer(manifest=self.versions[version][0], payload=(self._server.getsockname()[1], ticket))

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            with connection:
                for data in self._admit(connection.recv(TICKET_BYTES, socket.MSG_WAITALL)):
                    connection.sendall(data)

    def _admit(self, ticket: bytes) -> list[np.ndarray]:
        """Return the buckets that a ticket entitles to, and count its connection."""
        version, connections = self._tickets.get(ticket, (0, 0))
        if not connections:
            return []
        self._tickets[ticket] = version, connections - 1
        *whole, last = self.versions[version][1]
        if self.damaged_connections:
            self.damaged_connections -= 1
            last = last ^ 1
        return [*whole, last]


class SocketReceiver:
    """WeightReceiver that reads one bucket after the other from a connection."""

    def __init__(self, actor: str) -> None:
        self._actor = actor

    def receive(self, offer: WeightOffer) -> Iterator[tuple[str, Tensor]]:
        return verified_tensors(self._actor, offer.manifest, self._buckets(offer))

    def _buckets(self, offer: WeightOffer) -> Iterator[np.ndarray]:
        port, ticket = offer.payload
        with socket.create_connection((HOST, port), timeout=10) as connection, connection.makefile("rb") as stream:
            connection.sendall(ticket)
            for bucket in offer.manifest.buckets:
                yield np.frombuffer(stream.read(bucket.bytes), dtype=np.uint8)


class SocketTransfer:
    """WeightTransfer that asks the sender again for an actor that comes late."""

    def __init__(self, learner: TorchLearner) -> None:
        self._learner = learner
        self._newest = -1

    async def send(self, version: int) -> WeightOffer:
        self._newest = version
        return await self._learner.send(version)

    async def offer_for_late_actor(self, version: int) -> WeightOffer:
        return await asyncio.to_thread(self._learner.sender.repeat, version)

    def acknowledged(self) -> None:
        versions = self._learner.sender.versions
        for version in [version for version in versions if version != self._newest]:
            del versions[version]


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))


@torch.no_grad()
def score(model: nn.Module, rows: Sequence[Int32Array]) -> tuple[Float32Array, ...]:
    """Return log p(token t+1 | token t) of every row, `[T-1]` each."""
    ids = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    return tuple(model(row[:-1]).log_softmax(-1).gather(-1, row[1:, None])[:, 0].numpy() for row in ids)


class TorchLearner:
    """The parts of a Learner that the bus uses."""

    restarts = 0

    def __init__(self, sender: SocketSender) -> None:
        self.model, self.sender = build_model(), sender

    @torch.no_grad()
    def train(self) -> None:
        for parameter in self.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))

    async def score(self, probe: Sequence[Int32Array]) -> Sequence[Float32Array]:
        return score(self.model, probe)

    async def send(self, version: int) -> WeightOffer:
        tensors = ((name, parameter.detach()) for name, parameter in self.model.named_parameters())
        return self.sender.send(tensors, version=version, attempt=self.restarts)


class TorchActor:
    """ActorHandle of a model that loads what it receives."""

    def __init__(self, number: int) -> None:
        self.name, self.model, self.killed = str(number), build_model(), False
        self.receiver = SocketReceiver(self.name)

    async def start(self) -> None: ...

    async def probe(self, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        if self.killed:
            raise EngineError(f"actor {self.name} died: killed")
        return score(self.model, rows)

    async def update_weights(self, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck:
        offer = pickle.loads(pickle.dumps(offer))  # as between processes
        check_names(self.name, offer.manifest, self.model.state_dict())
        await asyncio.to_thread(self._load, offer)
        manifest, scores = offer.manifest, tuple(await self.probe(probe))
        return WeightAck(actor=self.name, version=manifest.version, attempt=manifest.attempt, probe_logprobs=scores)

    def _load(self, offer: WeightOffer) -> None:
        for name, tensor in self.receiver.receive(offer):
            self.model.get_parameter(name).data.copy_(tensor)

    async def progress(self) -> int:
        return 0

    async def close(self) -> None: ...

    def kill(self) -> None:
        self.killed = True


class World:
    """A bus over a fleet of two actors and a learner, connected by sockets."""

    def __init__(self) -> None:
        self.actors: list[TorchActor] = []
        self.messages: list[str] = []
        self.sender = SocketSender(receivers=2)
        self.learner = TorchLearner(self.sender)
        self.fleet = Fleet(self.spawn, 2, max_restarts=4, hang_timeout_s=60.0, say=self.messages.append)
        transfer: Any = SocketTransfer(self.learner)
        learner: Any = self.learner
        self.bus = WeightBus(learner, transfer, self.fleet, WeightSyncConfig(), "fp32", PROBE)

    def spawn(self, number: int, attempt: int) -> Any:
        self.actors.append(TorchActor(number))
        return self.actors[-1]

    def serving(self) -> list[TorchActor]:
        return [actor for actor in self.actors if not actor.killed]

    async def all_serving(self) -> None:
        while self.fleet.states() != [ActorState.SERVING] * 2:
            await asyncio.sleep(0.01)


def weights(model: nn.Module) -> dict[str, list[Any]]:
    return {name: parameter.tolist() for name, parameter in model.named_parameters()}


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        try:
            async with world.fleet:
                await asyncio.wait_for(test(world), 30)
        finally:
            world.sender.close()

    asyncio.run(main())


def test_two_actors_take_every_version() -> None:
    async def test(world: World) -> None:
        assert await world.bus.calibrate() == 0
        assert world.sender.versions == {}, "a calibration sends nothing"
        for version in (1, 2):
            world.learner.train()
            metrics = await world.bus.publish(version)
            assert [weights(actor.model) for actor in world.actors] == [weights(world.learner.model)] * 2
        # An embedding of 8 x 4, a weight of 8 x 4 and a bias of 8, 4 bytes each.
        assert metrics["weights/publish_bytes"] == 4 * (32 + 32 + 8)
        assert metrics["weights/probe_gap_max"] == 0
        assert list(world.sender.versions) == [2], "older versions are released"
        assert world.sender.repeated == []

    run(test)


def test_a_late_actor_gets_the_published_weights_and_not_the_present_ones() -> None:
    async def test(world: World) -> None:
        world.learner.train()
        await world.bus.publish(1)
        published = weights(world.learner.model)
        world.learner.train()  # towards version 2
        world.actors[0].kill()
        await world.fleet.probe(0, PROBE)  # the loss is noticed here, and the other actor answers
        await world.all_serving()
        assert [weights(actor.model) for actor in world.serving()] == [published] * 2
        assert world.sender.repeated == [1]
        await world.bus.publish(2)
        assert [weights(actor.model) for actor in world.serving()] == [weights(world.learner.model)] * 2

    run(test)


def test_an_offer_that_every_actor_has_used_is_worthless_to_a_late_one() -> None:
    async def test(world: World) -> None:
        sent: list[WeightOffer] = []
        send = world.learner.send

        async def recorded(version: int) -> WeightOffer:
            sent.append(await send(version))
            return sent[-1]

        world.learner.send = recorded  # type: ignore[method-assign]
        await world.bus.publish(1)
        with pytest.raises(WeightSyncError, match="has sha256"):
            await TorchActor(5).update_weights(sent[0], PROBE)

    run(test)


def test_a_damaged_bucket_is_detected_and_its_actor_replaced() -> None:
    async def test(world: World) -> None:
        world.learner.train()
        world.sender.damaged_connections = 1
        await world.bus.publish(1)
        await world.all_serving()
        lost = [message for message in world.messages if "is lost and replaced" in message]
        assert len(lost) == 1
        assert "weight version 1: the bucket that starts with tensor 1.bias has sha256" in lost[0]
        assert [weights(actor.model) for actor in world.serving()] == [weights(world.learner.model)] * 2
        assert len(world.actors) == 3 and world.sender.repeated == [1]

    run(test)


def test_a_version_that_reaches_every_actor_damaged_is_not_published() -> None:
    async def test(world: World) -> None:
        world.sender.damaged_connections = 100
        with pytest.raises(WeightSyncError, match=r"actor [01], weight version 1: .* has sha256"):
            await world.bus.publish(1)
        assert world.bus.version is None

    run(test)
