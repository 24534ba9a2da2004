"""Errors of a rollout actor whose weights do not arrive. Neither Ray nor an engine is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from ray import exceptions

from actors import rollout_actor
from actors.rollout_actor import RolloutActor
from actors.weights import CheckedDeliveries, ModelTensors
from rlsys.errors import LearnerLostError, RlsysError, WeightSyncError
from rlsys.transfer.object_store import BucketReceiver
from rlsys.transfer.shelf import BucketReply, BucketRequest
from rlsys.weight_types import WeightOffer

LOST_WITH_THE_RANK = [exceptions.OwnerDiedError, exceptions.ObjectLostError]
OUT_OF_REACH = [
    exceptions.ObjectFetchTimedOutError,
    exceptions.ObjectFreedError,
    exceptions.ReferenceCountingAssertionError,
]


def task_error(cause: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("take", "", cause)


def bare_actor(answer: Callable[[BucketRequest], BucketReply] | None) -> RolloutActor:
    """Return an actor without an engine.

    Args:
        answer: answers for the learner; None for the actor's own question to Ray.
    """
    actor = RolloutActor.__new__(RolloutActor)
    actor.name, actor.tensors, actor.loaded, actor.weight_timeout_s = "1", ModelTensors(all=frozenset()), 0, 3.0
    actor.loading = CheckedDeliveries("1", 0)
    ask = actor._ask_learner if answer is None else lambda _source, request: answer(request)
    actor.receiver = BucketReceiver("1", "1.0", ask, lambda reference: reference)
    return actor


@pytest.mark.parametrize(
    ("lost", "expected"),
    [*((kind, LearnerLostError) for kind in LOST_WITH_THE_RANK), *((kind, WeightSyncError) for kind in OUT_OF_REACH)],
)
def test_lost_weights_blame_the_rank_or_this_actor(
    lost: type[exceptions.ObjectLostError], expected: type[RlsysError]
) -> None:
    def update(*_arguments: object) -> None:
        raise lost("ab" * 28, None, "")

    actor = bare_actor(lambda _request: BucketReply())
    actor.engine = SimpleNamespace(update_weights=update)  # type: ignore[assignment]
    with pytest.raises(RlsysError, match=f"weight version 7.*{lost.__name__}") as caught:
        asyncio.run(actor.update_weights(WeightOffer(version=7, attempt=0, source=None), []))
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.ActorDiedError(), LearnerLostError),
        (exceptions.GetTimeoutError("no answer"), LearnerLostError),
        (exceptions.ActorUnavailableError("no route", None), WeightSyncError),
        (task_error(LearnerLostError("weight version 7 was never complete")), LearnerLostError),
        (task_error(WeightSyncError("weight version 7 is no longer there")), WeightSyncError),
    ],
    ids=["died", "silent", "out of reach", "failed", "replaced"],
)
def test_a_rank_that_does_not_give_the_weights_is_lost_unless_only_this_actor_cannot_reach_it(
    error: Exception, expected: type[RlsysError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(_reference: object, timeout: float) -> None:
        assert timeout == 3.0
        raise error

    monkeypatch.setattr(rollout_actor.ray, "get", get)
    actor = bare_actor(None)
    rank = SimpleNamespace(take=SimpleNamespace(remote=lambda request: request))
    with pytest.raises(RlsysError, match="weight version 7") as caught:
        asyncio.run(actor.update_weights(WeightOffer(version=7, attempt=0, source=rank), []))
    assert type(caught.value) is expected
