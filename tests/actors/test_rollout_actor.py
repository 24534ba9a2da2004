"""How an actor takes new weights, and its errors if they do not arrive. Neither Ray nor an engine is started."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray import exceptions

from actors import rollout_actor
from actors.rollout_actor import RolloutActor
from actors.weights import LoadProgress
from rlsys.errors import LearnerLostError, RlsysError, WeightSyncError
from rlsys.transfer.object_store import ObjectStoreReceiver, ObjectStoreSender
from rlsys.types import WeightManifest, WeightOffer

WITH_THE_RANK = [exceptions.OwnerDiedError, exceptions.ObjectLostError]
OUT_OF_REACH = [
    exceptions.ObjectFetchTimedOutError,
    exceptions.ObjectFreedError,
    exceptions.ReferenceCountingAssertionError,
]


@pytest.mark.parametrize(
    ("lost", "expected"),
    [*((kind, LearnerLostError) for kind in WITH_THE_RANK), *((kind, WeightSyncError) for kind in OUT_OF_REACH)],
)
def test_weights_are_lost_with_their_rank_or_for_this_actor_alone(
    lost: type[exceptions.ObjectLostError], expected: type[RlsysError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(*_arguments: object) -> None:
        raise lost("ab" * 28, None, "")

    monkeypatch.setattr(rollout_actor, "check_names", lambda *_: None)
    actor = RolloutActor.__new__(RolloutActor)
    actor.name, actor.tensors, actor.loaded, actor.loading = "1", {}, 0, LoadProgress()
    actor.receiver = ObjectStoreReceiver("1", lambda reference: reference)
    actor.engine = SimpleNamespace(update_weights=update)  # type: ignore[assignment]
    with pytest.raises(RlsysError, match=f"weight version 7.*{lost.__name__}") as caught:
        asyncio.run(actor.update_weights(WeightOffer(manifest=WeightManifest(version=7, buckets=()), payload=()), []))
    assert type(caught.value) is expected


def test_an_actor_loads_an_offer_and_acknowledges_it_with_the_probe() -> None:
    store: list[np.ndarray] = []
    sender = ObjectStoreSender(lambda data: store.append(data) or len(store) - 1, bucket_bytes=1)
    loaded: list[tuple[int, int, dict[str, list[float]]]] = []

    def update(version: int, attempt: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        loaded.append((version, attempt, {name: tensor.tolist() for name, tensor in tensors}))

    actor = RolloutActor.__new__(RolloutActor)
    actor.name, actor.tensors, actor.loaded, actor.loading = "1", frozenset({"a"}), 0, LoadProgress()
    actor.receiver = ObjectStoreReceiver("1", lambda number: store[number])
    actor.engine = SimpleNamespace(  # type: ignore[assignment]
        update_weights=update, prompt_logprobs=lambda rows: [-np.ones(len(row) - 1) for row in rows]
    )
    for version in (1, 2):
        tensors = iter([("a", torch.full((2,), float(version))), ("b", torch.zeros(1))])
        offer = sender.send(tensors, version=version, attempt=3)
        ack = asyncio.run(actor.update_weights(offer, [np.arange(3, dtype=np.int32)]))
        assert (ack.actor, ack.version, ack.attempt) == ("1", version, 3)
        assert [row.tolist() for row in ack.probe_logprobs] == [[-1.0, -1.0]]
    assert loaded == [(1, 3, {"a": [1.0, 1.0], "b": [0.0]}), (2, 3, {"a": [2.0, 2.0], "b": [0.0]})]
    assert (actor.loaded, actor.loading.count) == (2, 2), "both updates count as progress"
    actor.tensors = frozenset({"a", "c"})
    with pytest.raises(WeightSyncError, match=r"actor 1, weight version 2: tensor c is missing"):
        asyncio.run(actor.update_weights(offer, []))
    assert len(loaded) == 2
