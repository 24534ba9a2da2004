"""Weights from tensors to an engine of the same process, by the code of the object store's transport."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from learners.deepspeed.parameters import published_tensors
from rlsys.transfer.object_store import BucketReceiver, Delivery, ObjectStoreSender
from rlsys.weight_types import WeightManifest, WeightOffer

BUCKET_BYTES = 100_000


def receive(sender: ObjectStoreSender, version: int) -> Iterator[Delivery]:
    """Yield the buckets of a version that a sender has, verified."""
    receiver = BucketReceiver("0", "0.0", lambda source, request: source.take(request), lambda data: data)
    return receiver.receive(WeightOffer(version=version, attempt=0, source=sender))


def deliveries(tensors: Iterable[tuple[str, Any]], version: int) -> Iterator[Delivery]:
    """Yield the buckets of a version, verified."""
    sender = ObjectStoreSender(lambda data: data.copy(), BUCKET_BYTES)
    sender.send(iter(tensors), version=version, attempt=0, members=())
    return receive(sender, version)


class LocalLearner:
    """The parts of a Learner that the bus uses, over a model of this process."""

    restarts = 0
    shares_device = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sender = ObjectStoreSender(lambda data: data.copy(), BUCKET_BYTES)

    async def score(self, rows: Sequence[Any]) -> list[Any]:
        """Return log p(token t+1 | tokens 0..t) of every row, `[T-1]` each."""
        scores = []
        for row in rows:
            ids = torch.from_numpy(row.astype(np.int64))[None]
            logprobs = self.model(ids).logits.detach().float().log_softmax(-1)[0, :-1]
            scores.append(logprobs.gather(-1, ids[0, 1:, None])[:, 0].numpy())
        return scores

    def offer(self, version: int) -> WeightOffer:
        return WeightOffer(version=version, attempt=0, source=self.sender)

    async def send(self, version: int, members: Sequence[str]) -> WeightManifest:
        tensors = published_tensors(self.model, lambda parameter: parameter.detach())
        return self.sender.send(tensors, version=version, attempt=0, members=members)

    def receive(self, offer: WeightOffer) -> Iterator[Delivery]:
        return receive(self.sender, offer.version)
