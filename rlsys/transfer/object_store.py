"""Transport of weights through Ray's object store: one copy per node of a few buckets. Ray copies them between nodes.

The callers pass in Ray's `put` and `get`, so this module does not import Ray.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlsys.fault_injection import fault
from rlsys.transfer.shelf import BucketReply, BucketRequest, BucketShelf, GroupInfo, ShelvedBucket
from rlsys.transfer.wire import PackedBucket, check_digest, digest_of, pack
from rlsys.weight_types import WeightBucket, WeightManifest, WeightOffer

if TYPE_CHECKING:
    from torch import Tensor

STORED_BUCKETS = 2  # buckets whose references the sender holds
POLL_S = 1.0  # an actor asks again for a bucket that was not ready in this time


class ObjectStoreSender:
    """WeightSender that keeps a version in the memory of its process and stores each bucket when an actor asks for it.

    Args:
        put: stores the bytes of a bucket and returns a reference.
        bucket_bytes: size at which a bucket closes, >= 1.
    """

    def __init__(self, put: Callable[[np.ndarray], Any], bucket_bytes: int) -> None:
        self._put = put
        self._bucket_bytes = bucket_bytes
        self._shelf = BucketShelf()
        self._storing = threading.Lock()
        self._stored: OrderedDict[tuple[int, int, int], Any] = OrderedDict()

    def send(
        self, tensors: Iterator[tuple[str, Tensor]], *, version: int, attempt: int, members: Sequence[str]
    ) -> WeightManifest:
        """Make all tensors available, bucket by bucket."""
        self._shelf.begin(version, attempt)
        try:
            for packed in pack(tensors, self._bucket_bytes, self._shelf.buffer):
                self._shelf.add(packed.bucket, packed.data, last=packed.last)
                self._added(packed)
                fault("learner.bucket", version=version)
        except BaseException as error:
            self._shelf.fail(f"{type(error).__name__}: {error}")
            raise
        return self._shelf.end()

    def take(self, request: BucketRequest) -> BucketReply:
        """Answer an actor's question for a bucket, from any thread."""
        ready, shelved = self._shelf.take(request.version, request.attempt, request.index, POLL_S)
        if shelved is None:
            return BucketReply(ready=ready)
        return self._reply(request, shelved)

    def _added(self, packed: PackedBucket) -> None:
        """Take notice of a bucket that is ready."""

    def _reply(self, request: BucketRequest, shelved: ShelvedBucket) -> BucketReply:
        return BucketReply(bucket=shelved.bucket, last=shelved.last, reference=self._reference(request, shelved.data))

    def _reference(self, request: BucketRequest, data: np.ndarray) -> Any:
        """Return a reference of a bucket in the store. Actors that ask at about the same time share it."""
        key = (request.version, request.attempt, request.index)
        with self._storing:
            if key not in self._stored:
                self._stored[key] = self._put(data)
                while len(self._stored) > STORED_BUCKETS:
                    self._stored.popitem(last=False)
            return self._stored[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A bucket that has arrived at an actor, or that its engine receives by broadcast.

    Attributes:
        last: whether the version has no more buckets.
        data: its verified bytes, `[bytes] uint8`; None if the engine receives them from `group`.
        fetch: returns the verified bytes from the object store. Later buckets then come from there, too.
    """

    version: int
    bucket: WeightBucket
    last: bool
    data: np.ndarray | None
    group: GroupInfo | None
    fetch: Callable[[], np.ndarray]


class BucketReceiver:
    """WeightReceiver that asks learner rank 0 for one bucket after the other.

    Args:
        actor: name of the actor, for error messages.
        member: name of this process, see `BucketRequest`.
        ask: puts a question to the source of an offer and returns the answer.
        get: returns the bytes of a reference.

    Attributes:
        answers: answers so far. The number grows while the learner is alive, also before a bucket is ready.
    """

    def __init__(
        self,
        actor: str,
        member: str,
        ask: Callable[[Any, BucketRequest], BucketReply],
        get: Callable[[Any], np.ndarray],
    ) -> None:
        self._actor, self._member = actor, member
        self._ask, self._get = ask, get
        self._by_store = False
        self.answers = 0

    def receive(self, offer: WeightOffer) -> Iterator[Delivery]:
        """Yield all buckets of an offer, verified where they have arrived.

        Raises:
            WeightSyncError: a bucket is damaged, or the version was replaced.
            LearnerLostError: the learner could not gather the version.
        """
        self._by_store = False
        index = 0
        while (delivery := self._delivery(offer, index, self._by_store)) is not None:
            yield delivery
            if delivery.last:
                return
            index += 1

    def _delivery(self, offer: WeightOffer, index: int, by_store: bool) -> Delivery | None:
        reply = self._answer(offer, index, by_store)
        if reply.bucket is None:
            return None
        data = None if reply.group else self._verified(offer, reply)
        return Delivery(
            version=offer.version,
            bucket=reply.bucket,
            last=reply.last,
            data=data,
            group=reply.group,
            fetch=lambda: self._fetch(offer, index),
        )

    def _answer(self, offer: WeightOffer, index: int, by_store: bool) -> BucketReply:
        request = BucketRequest(
            version=offer.version, attempt=offer.attempt, index=index, member=self._member, by_store=by_store
        )
        while not (reply := self._ask(offer.source, request)).ready:
            self.answers += 1
        self.answers += 1
        return reply

    def _fetch(self, offer: WeightOffer, index: int) -> np.ndarray:
        self._by_store = True
        return self._verified(offer, self._answer(offer, index, by_store=True))

    def _verified(self, offer: WeightOffer, reply: BucketReply) -> np.ndarray:
        assert reply.bucket is not None  # noqa: S101 - the caller has one
        data = self._get(reply.reference)
        check_digest(self._actor, offer.version, reply.bucket, digest_of(data))
        return data
