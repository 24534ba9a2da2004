"""The object store's transport: shelf, sender and receiver, with a dictionary as the store."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.errors import LearnerLostError, WeightSyncError
from rlsys.transfer import object_store
from rlsys.transfer.object_store import STORED_BUCKETS, BucketReceiver, ObjectStoreSender
from rlsys.transfer.shelf import BucketRequest, BucketShelf
from rlsys.transfer.wire import as_tensor, unpack
from rlsys.weight_types import WeightOffer

TENSORS = [("a.weight", torch.arange(4.0)), ("b.weight", torch.ones(2, 2, dtype=torch.bfloat16))]


class Store:
    """Objects by reference, and the order in which they were fetched."""

    def __init__(self) -> None:
        self.objects: dict[str, np.ndarray] = {}
        self.fetched: list[str] = []

    def put(self, data: np.ndarray) -> str:
        reference = f"object {len(self.objects)}"
        self.objects[reference] = data.copy()
        return reference

    def get(self, reference: str) -> np.ndarray:
        self.fetched.append(reference)
        return self.objects[reference]


def ask(source: ObjectStoreSender, request: BucketRequest) -> Any:
    return pickle.loads(pickle.dumps(source.take(pickle.loads(pickle.dumps(request)))))


def offer(sender: ObjectStoreSender, version: int, attempt: int = 0) -> WeightOffer:
    return WeightOffer(version=version, attempt=attempt, source=sender)


def send(sender: ObjectStoreSender, version: int, attempt: int = 0) -> Any:
    return sender.send(iter(TENSORS), version=version, attempt=attempt, members=())


def test_a_receiver_yields_what_the_sender_sent_bucket_by_bucket() -> None:
    store = Store()
    sender = ObjectStoreSender(store.put, bucket_bytes=1)
    manifest = send(sender, 7, attempt=2)
    assert (manifest.version, manifest.attempt, manifest.bytes) == (7, 2, 16 + 8)
    assert store.objects == {}, "only what an actor asks for is stored"
    receiver = BucketReceiver("1", "1.0", ask, store.get)
    arriving = receiver.receive(offer(sender, 7, attempt=2))
    first = next(arriving)
    assert store.fetched == ["object 0"] and list(store.objects) == ["object 0"]
    (second,) = arriving
    assert receiver.answers == 2, "one question for each bucket: the last one says that it is the last"
    received = [entry for each in (first, second) for entry in unpack(each.bucket, as_tensor(each.data))]
    assert [(name, value.dtype) for name, value in received] == [(name, value.dtype) for name, value in TENSORS]
    assert all(torch.equal(value, sent) for (_, value), (_, sent) in zip(received, TENSORS, strict=True))


def test_actors_that_ask_at_about_the_same_time_share_an_object_and_few_are_held() -> None:
    store = Store()
    sender = ObjectStoreSender(store.put, bucket_bytes=1)
    sender.send(((f"t{n}", torch.full((4,), float(n))) for n in range(5)), version=1, attempt=0, members=())
    early, late = (BucketReceiver("1", "1.0", ask, store.get).receive(offer(sender, 1)) for _ in range(2))
    for _ in range(5):
        next(early), next(late)
    assert len(store.objects) == 5 and len(sender._stored) == STORED_BUCKETS
    assert len(list(BucketReceiver("2", "2.0", ask, store.get).receive(offer(sender, 1)))) == 5
    assert len(store.objects) == 5 + 5, "an actor that comes long after gets them stored again"


def test_a_damaged_object_names_actor_version_and_tensor() -> None:
    store = Store()
    sender = ObjectStoreSender(store.put, bucket_bytes=1)
    send(sender, 7)
    arriving = BucketReceiver("4", "4.0", ask, store.get).receive(offer(sender, 7))
    next(arriving)
    sender.take(BucketRequest(version=7, attempt=0, index=1, member="4.0"))
    store.objects["object 1"][0] ^= 1
    with pytest.raises(WeightSyncError, match=r"actor 4, weight version 7: .* tensor b\.weight has xxh3"):
        next(arriving)


def test_a_replaced_version_is_refused_and_the_same_version_of_a_new_attempt_is_another_one() -> None:
    store = Store()
    sender = ObjectStoreSender(store.put, bucket_bytes=1)
    send(sender, 1)
    send(sender, 2)
    with pytest.raises(WeightSyncError, match="weight version 1 is no longer in the memory of the learner"):
        next(BucketReceiver("1", "1.0", ask, store.get).receive(offer(sender, 1)))
    send(sender, 2, attempt=1)
    with pytest.raises(WeightSyncError, match="weight version 2 is no longer"):
        next(BucketReceiver("1", "1.0", ask, store.get).receive(offer(sender, 2)))
    assert len(list(BucketReceiver("1", "1.0", ask, store.get).receive(offer(sender, 2, attempt=1)))) == 2


def test_a_bucket_is_taken_while_the_next_one_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "POLL_S", 0.05)
    store, gate = Store(), threading.Event()
    sender = ObjectStoreSender(store.put, bucket_bytes=1)

    def gathering() -> Any:
        yield from TENSORS
        assert gate.wait(10)
        yield "c.weight", torch.zeros(3)

    receiver = BucketReceiver("1", "1.0", ask, store.get)
    arriving = receiver.receive(offer(sender, 3))  # before the learner has begun
    threading.Timer(0.2, lambda: sender.send(gathering(), version=3, attempt=0, members=())).start()
    assert next(arriving).bucket.tensors[0].name == "a.weight"
    answers = receiver.answers
    assert answers > 1, "the learner answers while it has nothing to give"
    threading.Timer(0.2, gate.set).start()
    assert [each.bucket.tensors[0].name for each in arriving] == ["b.weight", "c.weight"]
    assert receiver.answers > answers + 3


def test_a_learner_that_fails_tells_actors_that_wait() -> None:
    shelf = BucketShelf()
    shelf.begin(1, 0)
    threading.Timer(0.1, lambda: shelf.fail("RuntimeError: out of memory")).start()
    with pytest.raises(LearnerLostError, match="weight version 1 was never complete: RuntimeError: out of memory"):
        shelf.take(1, 0, 0, wait_s=10)


def test_the_memory_of_a_version_is_used_again_for_the_next_one() -> None:
    sender = ObjectStoreSender(Store().put, bucket_bytes=1)
    send(sender, 1)
    first = [id(each.data) for each in sender._shelf._buckets]
    send(sender, 2)
    assert [id(each.data) for each in sender._shelf._buckets] == first
    sender.send(iter([("a.weight", torch.arange(8.0))]), version=3, attempt=0, members=())
    shelf = sender._shelf
    assert [each.data.nbytes for each in shelf._buckets] == [data.nbytes for data in shelf._memory] == [32]
