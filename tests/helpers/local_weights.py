"""Weights from tensors to an engine of the same process, by the code of the object store's transport."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rlsys.transfer.object_store import BucketReceiver, Delivery, ObjectStoreSender
from rlsys.types import WeightOffer


def deliveries(tensors: Iterable[tuple[str, Any]], version: int, bucket_bytes: int = 100_000) -> Iterator[Delivery]:
    """Yield the buckets of a version, verified."""
    sender = ObjectStoreSender(lambda data: data.copy(), bucket_bytes)
    sender.send(iter(tensors), version=version, attempt=0, members=())
    receiver = BucketReceiver("0", "0.0", lambda source, request: source.take(request), lambda data: data)
    return receiver.receive(WeightOffer(version=version, attempt=0, source=sender))
