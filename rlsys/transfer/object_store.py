"""Transport of weights through Ray's object store: one copy per node. Ray copies them between nodes.

The callers pass in Ray's `put` and `get`, so this module does not import Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rlsys.errors import WeightSyncError
from rlsys.interfaces import Learner
from rlsys.transfer.wire import pack, verified_tensors
from rlsys.types import WeightManifest, WeightOffer

if TYPE_CHECKING:
    from torch import Tensor


class ObjectStoreSender:
    """WeightSender that puts every bucket into the store. The payload of its offers is a reference per bucket.

    Args:
        put: stores the bytes of a bucket and returns a reference.
        bucket_bytes: size at which a bucket closes, >= 1.
    """

    def __init__(self, put: Callable[[np.ndarray], Any], bucket_bytes: int) -> None:
        self._put = put
        self._bucket_bytes = bucket_bytes

    def send(self, tensors: Iterator[tuple[str, Tensor]], *, version: int, attempt: int) -> WeightOffer:
        """Store all tensors, bucket by bucket."""
        stored = [(bucket, self._put(data)) for bucket, data in pack(tensors, self._bucket_bytes)]
        manifest = WeightManifest(version=version, attempt=attempt, buckets=tuple(bucket for bucket, _ in stored))
        return WeightOffer(manifest=manifest, payload=tuple(reference for _, reference in stored))


class ObjectStoreReceiver:
    """WeightReceiver that fetches one bucket at a time.

    Args:
        actor: name of the actor, for error messages.
        get: returns the bytes of a reference.
    """

    def __init__(self, actor: str, get: Callable[[Any], np.ndarray]) -> None:
        self._actor = actor
        self._get = get

    def receive(self, offer: WeightOffer) -> Iterator[tuple[str, Tensor]]:
        """Yield the verified tensors of an offer.

        Raises:
            WeightSyncError: a bucket is damaged.
        """
        return verified_tensors(self._actor, offer.manifest, map(self._get, offer.payload))


class ObjectStoreTransfer:
    """WeightTransfer that holds the references, and with them the stored weights.

    Weights stay in the store until the next version is acknowledged, for the actors that start until then. The
    store loses them when the learner rank that stored them dies. Then no learner has this version.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._acknowledged: WeightOffer | None = None
        self._newest: WeightOffer | None = None

    async def send(self, version: int) -> WeightOffer:
        """Let the learner store its present weights."""
        self._newest = await self._learner.send(version)
        return self._newest

    async def offer_for_late_actor(self, version: int) -> WeightOffer:
        """Return the offer of a version again.

        Raises:
            WeightSyncError: a later version was acknowledged, so the weights were released.
        """
        for offer in (self._newest, self._acknowledged):
            if offer is not None and offer.manifest.version == version:
                return offer
        raise WeightSyncError(f"weight version {version} is no longer in the object store for a late actor")

    def acknowledged(self) -> None:
        """Release the version before the newest one."""
        self._acknowledged = self._newest
