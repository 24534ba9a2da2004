"""The object store's transport: sender and receiver with a dictionary as the store, and the life of an offer."""

from __future__ import annotations

import asyncio
import pickle

import numpy as np
import pytest
import torch
from fakes import FakeLearner

from rlsys.errors import WeightSyncError
from rlsys.transfer.object_store import ObjectStoreReceiver, ObjectStoreSender, ObjectStoreTransfer

TENSORS = [("a.weight", torch.arange(4.0)), ("b.weight", torch.ones(2, 2, dtype=torch.bfloat16))]


class Store:
    """Objects by reference, and the order in which they were fetched."""

    def __init__(self) -> None:
        self.objects: dict[str, np.ndarray] = {}
        self.fetched: list[str] = []

    def put(self, data: np.ndarray) -> str:
        reference = f"object {len(self.objects)}"
        self.objects[reference] = data
        return reference

    def get(self, reference: str) -> np.ndarray:
        self.fetched.append(reference)
        return self.objects[reference]


def test_a_receiver_yields_what_the_sender_stored() -> None:
    store = Store()
    offer = ObjectStoreSender(store.put, bucket_bytes=1).send(iter(TENSORS), version=7, attempt=2)
    assert (offer.manifest.version, offer.manifest.attempt) == (7, 2)
    assert offer.payload == ("object 0", "object 1")
    tensors = ObjectStoreReceiver("1", store.get).receive(pickle.loads(pickle.dumps(offer)))
    assert store.fetched == []
    name, value = next(tensors)
    assert store.fetched == ["object 0"], "one bucket at a time"
    assert (name, value.tolist()) == ("a.weight", [0.0, 1.0, 2.0, 3.0])
    ((name, value),) = tensors
    assert (name, value.dtype, value.shape) == ("b.weight", torch.bfloat16, (2, 2))
    assert torch.equal(value, TENSORS[1][1])


def test_a_damaged_object_names_actor_version_and_tensor() -> None:
    store = Store()
    offer = ObjectStoreSender(store.put, bucket_bytes=1).send(iter(TENSORS), version=7, attempt=0)
    store.objects["object 1"][0] ^= 1
    with pytest.raises(WeightSyncError, match=r"actor 4, weight version 7: .* tensor b\.weight has sha256"):
        list(ObjectStoreReceiver("4", store.get).receive(offer))


def test_a_late_actor_gets_the_version_of_the_fleet_while_the_next_one_is_on_its_way() -> None:
    async def main() -> None:
        learner = FakeLearner([])
        transfer = ObjectStoreTransfer(learner)
        first = await transfer.send(1)
        assert await transfer.offer_for_late_actor(1) is first, "not acknowledged yet"
        transfer.acknowledged()
        second = await transfer.send(2)
        assert await transfer.offer_for_late_actor(1) is first
        assert await transfer.offer_for_late_actor(2) is second
        transfer.acknowledged()
        with pytest.raises(WeightSyncError, match="weight version 1 is no longer in the object store"):
            await transfer.offer_for_late_actor(1)
        assert learner.calls == [("send", 1), ("send", 2)], "the learner is not asked again"

    asyncio.run(main())


def test_after_a_return_to_a_checkpoint_a_repeated_version_is_the_new_one() -> None:
    async def main() -> None:
        learner = FakeLearner([])
        transfer = ObjectStoreTransfer(learner)
        await transfer.send(1)
        transfer.acknowledged()
        learner.restarts = 1
        repeated = await transfer.send(1)
        assert (await transfer.offer_for_late_actor(1)) is repeated
        assert repeated.manifest.attempt == 1

    asyncio.run(main())
