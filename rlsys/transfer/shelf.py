"""The newest weights of the policy in the memory of learner rank 0, bucket by bucket, for all actors that ask.

The rank adds buckets while it gathers; actors take them from other threads, as soon as they are there and also long
after. So an actor that starts late gets the published version, whatever the learner has trained since.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsys.errors import LearnerLostError, WeightSyncError
from rlsys.weight_types import WeightBucket, WeightManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """A process group for broadcasts, and the place of one actor in it.

    Attributes:
        path: file of the rendezvous, which also identifies the group.
        rank: rank of the first worker of the actor's engine; learner rank 0 has rank 0.
        size: number of members.
        timeout_s: seconds that one operation may take.
    """

    path: str
    rank: int
    size: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRequest:
    """A question of an actor for one bucket.

    Attributes:
        index: number of the bucket in its version, from 0.
        member: name of the process of the actor, see `rlsys.control.actor_slots.ActorSlot.member`.
        by_store: whether the bytes must come through the object store, because no broadcast reaches the actor.
    """

    version: int
    attempt: int
    index: int
    member: str
    by_store: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketReply:
    """The answer to a `BucketRequest`.

    Attributes:
        ready: False if the bucket is not gathered yet; the actor asks again.
        bucket: description of the bucket; None after the last one.
        last: whether it is the last bucket, so that the actor need not ask for another one.
        reference: reference of its bytes in the object store; None if they are broadcast.
        group: the group of the broadcast.
    """

    ready: bool = True
    bucket: WeightBucket | None = None
    last: bool = False
    reference: Any = None
    group: GroupInfo | None = None


@dataclass(frozen=True, slots=True)
class ShelvedBucket:
    """A bucket of the shelf. `data` has its bytes, `[bytes] uint8`; `last` tells that no other bucket follows."""

    bucket: WeightBucket
    data: np.ndarray
    last: bool


class BucketShelf:
    """Buckets of one version, which one thread adds and any thread takes.

    The memory of a bucket is used again for the next version. Nobody takes a version at that time: the fleet makes one
    publish after the other, and actors catch up in between.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._key: tuple[int, int] | None = None
        self._buckets: list[ShelvedBucket] = []
        self._memory: list[np.ndarray] = []
        self._complete = False
        self._failure = ""

    def begin(self, version: int, attempt: int) -> None:
        """Replace the present version by a new one without buckets."""
        with self._changed:
            self._key, self._buckets, self._complete, self._failure = (version, attempt), [], False, ""
            self._changed.notify_all()

    def buffer(self, index: int, size: int) -> np.ndarray:
        """Return memory for a bucket, that of the last version if the size is the same."""
        if index == len(self._memory):
            self._memory.append(np.empty(size, dtype=np.uint8))
        elif self._memory[index].nbytes != size:
            self._memory[index] = np.empty(size, dtype=np.uint8)
        return self._memory[index]

    def add(self, bucket: WeightBucket, data: np.ndarray, *, last: bool) -> None:
        """Add the next bucket."""
        with self._changed:
            self._buckets.append(ShelvedBucket(bucket, data, last))
            self._changed.notify_all()

    def end(self) -> WeightManifest:
        """Declare the version complete and return its contents."""
        with self._changed:
            assert self._key is not None  # noqa: S101 - begin comes first
            self._complete = True
            del self._memory[len(self._buckets) :]
            self._changed.notify_all()
            version, attempt = self._key
            return WeightManifest(
                version=version, attempt=attempt, buckets=tuple(each.bucket for each in self._buckets)
            )

    def fail(self, problem: str) -> None:
        """Let all actors that wait for the version know that it will never be complete."""
        with self._changed:
            self._failure = problem
            self._changed.notify_all()

    def take(self, version: int, attempt: int, index: int, wait_s: float) -> tuple[bool, ShelvedBucket | None]:
        """Return whether the answer is known, and a bucket; None after the last one.

        Args:
            wait_s: seconds to wait for a bucket that is not there yet.

        Raises:
            WeightSyncError: the version was replaced by another one.
            LearnerLostError: the learner failed to gather the version.
        """
        key = (version, attempt)

        def known() -> bool:
            replaced = self._key is not None and self._key > key
            here = self._key == key and (self._complete or self._failure != "" or index < len(self._buckets))
            return replaced or here

        with self._changed:
            if not self._changed.wait_for(known, wait_s):
                return False, None
            if self._key != key:
                raise WeightSyncError(f"weight version {version} is no longer in the memory of the learner")
            if index < len(self._buckets):
                return True, self._buckets[index]
            if self._failure:
                raise LearnerLostError(f"weight version {version} was never complete: {self._failure}")
            return True, None
