"""Both transports under the real bus, fleet and loader: from one learner to two actors, over the real gloo.

The learner and the actors are small torch models in threads of one process. Tensors, checksums and probes are real.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actors.weight_loading import BucketLoader
from actors.weights import CheckedDeliveries
from rlsys.config.schema import WeightSyncConfig
from rlsys.control.actor_slots import ActorState
from rlsys.control.fleet import Fleet
from rlsys.control.weights import WeightBus
from rlsys.errors import EngineError, LearnerLostError, RlsysError
from rlsys.transfer.collective import BroadcastReceiver, CollectiveSender
from rlsys.transfer.object_store import BucketReceiver, ObjectStoreSender
from rlsys.transfer.pipeline import prefetched
from rlsys.transfer.shelf import GroupInfo
from rlsys.transfer.wire import as_tensor, check_digest, unpack
from rlsys.types import Float32Array, Int32Array
from rlsys.weight_types import WeightAck, WeightManifest, WeightOffer

TRANSPORTS = ("object_store", "collective")
BUCKET_BYTES = 100
PROBE = (np.array([1, 5, 2, 7], dtype=np.int32), np.array([3, 4], dtype=np.int32))
TIMEOUT_S = 8.0  # an operation of a group has a quarter of it


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))


@torch.no_grad()
def score(model: nn.Module, rows: Sequence[Int32Array]) -> tuple[Float32Array, ...]:
    """Return log p(token t+1 | token t) of every row, `[T-1]` each."""
    ids = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    return tuple(model(row[:-1]).log_softmax(-1).gather(-1, row[1:, None])[:, 0].numpy() for row in ids)


class TorchLearner:
    """The parts of a Learner that the bus uses. `on_tensor` is called before a tensor is gathered, with its number."""

    restarts, shares_device = 0, False

    def __init__(self, sender: ObjectStoreSender) -> None:
        self.model, self.sender = build_model(), sender
        self.on_tensor: Callable[[int], object] = lambda _number: None

    @torch.no_grad()
    def train(self) -> None:
        for parameter in self.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))

    async def score(self, probe: Sequence[Int32Array]) -> Sequence[Float32Array]:
        return score(self.model, probe)

    def offer(self, version: int) -> WeightOffer:
        return WeightOffer(version=version, attempt=self.restarts, source=self.sender)

    async def send(self, version: int, members: Sequence[str]) -> WeightManifest:
        def tensors() -> Any:
            for number, (name, parameter) in enumerate(self.model.named_parameters()):
                self.on_tensor(number)
                yield name, parameter.detach()

        return await asyncio.to_thread(self.sender.send, tensors(), version=version, attempt=0, members=members)


class TorchWorker:
    """The remote calls of one engine worker, as `actors.weight_transfer` implements them for vLLM."""

    def __init__(self) -> None:
        self.model = build_model()
        self.broadcast: BroadcastReceiver | None = None
        self.by_broadcast = 0
        self.on_bucket: Callable[[], object] = lambda: None

    def collective_rpc(self, method: str, *, args: tuple[Any, ...] = (), kwargs: Any = None) -> list[Any]:
        return [getattr(self, method)(*args, **(kwargs or {}))]

    def start_weight_update(self) -> None: ...

    def finish_weight_update(self) -> None: ...

    def join_broadcast(self, group: GroupInfo) -> str:
        try:
            self.broadcast = BroadcastReceiver(group, group.rank, "cpu")
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def await_bucket(self, version: int) -> bool:
        self.on_bucket()
        return self.broadcast is not None and self.broadcast.wait(version)

    def leave_broadcast(self) -> None:
        if self.broadcast is not None:
            self.broadcast.close()
            self.broadcast = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = dict(update_info)
        if info["data"] is None:
            assert self.broadcast is not None
            raw, digest = self.broadcast.take()
            check_digest(info["actor"], info["version"], info["bucket"], digest)
            self.by_broadcast += 1
        else:
            self.on_bucket()
            raw = as_tensor(info["data"])
        for name, tensor in unpack(info["bucket"], raw, info["skip"]):
            self.model.get_parameter(name).data.copy_(tensor)


class TorchActor:
    """ActorHandle of a model that loads what it receives."""

    def __init__(self, number: int, attempt: int) -> None:
        self.name, self.killed = str(number), threading.Event()
        self.worker = TorchWorker()
        self.damaged = False
        self.receiver = BucketReceiver(self.name, f"{number}.{attempt}", self.ask, self.get)
        self.loader = BucketLoader(self.name, self.worker, shares_memory=True)

    @property
    def model(self) -> nn.Module:
        return self.worker.model

    def ask(self, source: ObjectStoreSender, request: Any) -> Any:
        if self.killed.is_set():
            raise EngineError("killed")
        return pickle.loads(pickle.dumps(source.take(pickle.loads(pickle.dumps(request)))))  # as between processes

    def get(self, reference: np.ndarray) -> np.ndarray:
        if self.damaged:
            self.damaged = False
            return reference ^ 1
        return reference

    async def start(self) -> None: ...

    async def probe(self, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        if self.killed.is_set():
            raise EngineError(f"actor {self.name} died: killed")
        return score(self.model, rows)

    async def update_weights(self, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck:
        await asyncio.to_thread(self._load, offer)
        scores = tuple(await self.probe(probe))
        return WeightAck(actor=self.name, version=offer.version, attempt=offer.attempt, probe_logprobs=scores)

    def _load(self, offer: WeightOffer) -> None:
        try:
            arriving = prefetched(self.receiver.receive(offer))
            self.loader.load(CheckedDeliveries(self.name, offer.version, arriving, self.model.state_dict()))
        except RlsysError:
            raise
        except Exception as error:
            raise EngineError(f"actor {self.name} died: {error}") from error

    async def progress(self) -> int:
        return 0

    async def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        """End like a process, whose sockets the system closes."""
        self.killed.set()
        self.worker.leave_broadcast()


class World:
    """A bus over a fleet of two actors and a learner."""

    def __init__(self, transport: str, folder: Path) -> None:
        self.actors: list[TorchActor] = []
        self.messages: list[str] = []
        self.stored: list[int] = []
        self.sender = self.make_sender(transport, folder)
        self.learner = TorchLearner(self.sender)
        self.fleet = Fleet(self.spawn, 2, max_restarts=4, hang_timeout_s=60.0, say=self.messages.append)
        learner: Any = self.learner
        self.bus = WeightBus(learner, self.fleet, WeightSyncConfig(), "fp32", PROBE)

    def make_sender(self, transport: str, folder: Path) -> ObjectStoreSender:
        if transport == "object_store":
            return ObjectStoreSender(self.put, BUCKET_BYTES)
        return CollectiveSender(
            self.put, BUCKET_BYTES, device="cpu", rendezvous=str(folder / "store"), workers=1, timeout_s=TIMEOUT_S
        )

    def put(self, data: np.ndarray) -> np.ndarray:
        self.stored.append(data.nbytes)
        return data.copy()

    def spawn(self, number: int, attempt: int) -> Any:
        self.actors.append(TorchActor(number, attempt))
        return self.actors[-1]

    def serving(self) -> list[TorchActor]:
        return [actor for actor in self.actors if not actor.killed.is_set()]

    async def all_serving(self) -> None:
        while self.fleet.states() != [ActorState.SERVING] * 2:
            await asyncio.sleep(0.01)

    def assert_all_have(self, expected: dict[str, Any]) -> None:
        assert [weights(actor.model) for actor in self.serving()] == [expected] * 2


def weights(model: nn.Module) -> dict[str, list[Any]]:
    return {name: parameter.tolist() for name, parameter in model.named_parameters()}


def run(transport: str, folder: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(transport, folder)
        async with world.fleet:
            await asyncio.wait_for(test(world), 60)

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "broadcast":  # it waits in gloo for a member that never comes
            thread.join(TIMEOUT_S)


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_actors_take_every_version(tmp_path: Path, transport: str) -> None:
    async def test(world: World) -> None:
        assert await world.bus.calibrate() == 0
        for version in (1, 2, 3):
            world.learner.train()
            metrics = await world.bus.publish(version)
            world.assert_all_have(weights(world.learner.model))
        # An embedding of 8 x 4, a weight of 8 x 4 and a bias of 8, 4 bytes each; a bucket closes at 100 bytes.
        assert metrics["weights/publish_bytes"] == 4 * (32 + 32 + 8)
        assert metrics["weights/probe_gap_max"] == 0
        by_broadcast = [actor.worker.by_broadcast for actor in world.actors]
        if transport == "collective":
            assert by_broadcast == [9, 9] and world.stored == [], "three buckets in each of three versions"
            assert len(list(tmp_path.glob("store-weights-*"))) <= 1, "one group for all versions"
        else:
            assert by_broadcast == [0, 0] and set(world.stored) == {128, 32}

    run(transport, tmp_path, test)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_late_actor_gets_the_published_weights_and_not_the_present_ones(tmp_path: Path, transport: str) -> None:
    async def test(world: World) -> None:
        world.learner.train()
        await world.bus.publish(1)
        published = weights(world.learner.model)
        world.learner.train()  # towards version 2
        world.actors[0].kill()
        await world.fleet.probe(0, PROBE)  # the loss is noticed here, and the other actor answers
        await world.all_serving()
        world.assert_all_have(published)
        assert world.stored, "a late actor takes the weights from the store"
        await world.bus.publish(2)
        world.assert_all_have(weights(world.learner.model))
        if transport == "collective":
            assert [actor.worker.by_broadcast for actor in world.serving()] == [6, 3], "the new actor is a member now"

    run(transport, tmp_path, test)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("bucket", [0, 1, 2])
def test_an_actor_that_dies_in_the_middle_of_a_publish_holds_nobody_up(
    tmp_path: Path, transport: str, bucket: int
) -> None:
    async def test(world: World) -> None:
        await world.bus.publish(1)
        victim, taken = world.actors[1], itertools.count()

        def die() -> None:
            if next(taken) == bucket:
                victim.kill()
                raise EngineError("actor 1 died")

        victim.worker.on_bucket = die
        world.learner.train()
        started = time.monotonic()
        await world.bus.publish(2)
        assert time.monotonic() - started < TIMEOUT_S
        await world.all_serving()
        world.assert_all_have(weights(world.learner.model))
        assert victim.killed.is_set() and not world.actors[0].killed.is_set()
        world.learner.train()
        await world.bus.publish(3)
        world.assert_all_have(weights(world.learner.model))

    run(transport, tmp_path, test)


def test_an_actor_that_stops_in_the_middle_of_a_broadcast_holds_the_other_up_for_a_part_of_the_limit(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        world.learner.train()
        stopped = threading.Event()
        world.actors[1].worker.on_bucket = lambda: stopped.wait()
        publish = asyncio.create_task(world.bus.publish(1))
        started = time.monotonic()
        while weights(world.actors[0].model) != weights(world.learner.model):
            await asyncio.sleep(0.01)
        assert time.monotonic() - started < TIMEOUT_S
        world.actors[1].kill()
        stopped.set()
        await publish
        await world.all_serving()
        world.assert_all_have(weights(world.learner.model))

    run("collective", tmp_path, test)


def test_a_member_that_never_joins_the_group_costs_a_part_of_the_limit(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.learner.train()
        world.actors[1].worker.join_broadcast = lambda group: "no route"  # type: ignore[method-assign]
        started = time.monotonic()
        await world.bus.publish(1)
        assert time.monotonic() - started < TIMEOUT_S
        world.assert_all_have(weights(world.learner.model))

    run("collective", tmp_path, test)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_actors_load_a_bucket_while_the_learner_gathers_the_next_one(tmp_path: Path, transport: str) -> None:
    async def test(world: World) -> None:
        loaded = threading.Event()
        before = weights(world.actors[0].model)

        def look(number: int) -> None:
            if number == 2:  # the third tensor: the first bucket has closed with the second
                deadline = time.monotonic() + 10
                while weights(world.actors[0].model)["0.weight"] == before["0.weight"] and time.monotonic() < deadline:
                    time.sleep(0.01)
                loaded.set() if time.monotonic() < deadline else None

        world.learner.train()
        world.learner.on_tensor = look
        await world.bus.publish(1)
        assert loaded.is_set()

    run(transport, tmp_path, test)


def test_a_damaged_bucket_is_detected_and_its_actor_replaced(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.learner.train()
        world.actors[1].damaged = True
        await world.bus.publish(1)
        await world.all_serving()
        lost = [message for message in world.messages if "is lost and replaced" in message]
        assert len(lost) == 1
        assert "actor 1, weight version 1: the bucket that starts with tensor 0.weight has xxh3" in lost[0]
        world.assert_all_have(weights(world.learner.model))

    run("object_store", tmp_path, test)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_learner_that_fails_while_it_gathers_ends_the_publish_at_once(tmp_path: Path, transport: str) -> None:
    async def test(world: World) -> None:
        def fail(number: int) -> None:
            if number == 2:
                raise LearnerLostError("learner rank 0: out of memory")

        world.learner.on_tensor = fail
        started = time.monotonic()
        with pytest.raises(LearnerLostError, match="out of memory"):
            await world.bus.publish(1)
        assert time.monotonic() - started < TIMEOUT_S
        assert world.bus.version is None

    run(transport, tmp_path, test)
