"""Errors of a rollout actor whose weights do not arrive. Neither Ray nor an engine is started."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from ray import exceptions

from actors import rollout_actor
from actors.rollout_actor import RolloutActor
from actors.weights import LoadProgress, ModelTensors
from rlsys.errors import LearnerLostError, RlsysError, WeightSyncError
from rlsys.transfer.object_store import ObjectStoreReceiver
from rlsys.types import WeightManifest, WeightOffer

LOST_WITH_THE_RANK = [exceptions.OwnerDiedError, exceptions.ObjectLostError]
OUT_OF_REACH = [
    exceptions.ObjectFetchTimedOutError,
    exceptions.ObjectFreedError,
    exceptions.ReferenceCountingAssertionError,
]


@pytest.mark.parametrize(
    ("lost", "expected"),
    [*((kind, LearnerLostError) for kind in LOST_WITH_THE_RANK), *((kind, WeightSyncError) for kind in OUT_OF_REACH)],
)
def test_lost_weights_blame_the_rank_or_this_actor(
    lost: type[exceptions.ObjectLostError], expected: type[RlsysError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(*_arguments: object) -> None:
        raise lost("ab" * 28, None, "")

    monkeypatch.setattr(rollout_actor, "check_names", lambda *_: None)
    actor = RolloutActor.__new__(RolloutActor)
    actor.name, actor.tensors, actor.loaded, actor.loading = "1", ModelTensors(all=frozenset()), 0, LoadProgress()
    actor.receiver = ObjectStoreReceiver("1", lambda reference: reference)
    actor.engine = SimpleNamespace(update_weights=update)  # type: ignore[assignment]
    with pytest.raises(RlsysError, match=f"weight version 7.*{lost.__name__}") as caught:
        asyncio.run(actor.update_weights(WeightOffer(manifest=WeightManifest(version=7, buckets=()), payload=()), []))
    assert type(caught.value) is expected
