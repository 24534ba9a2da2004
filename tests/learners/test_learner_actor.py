"""The Ray shell around a rank: how it sends weights and scores the probe."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from joint_samples import ids

from learners import learner_actor
from learners.learner_actor import LearnerActor
from rlsys.interfaces import WeightSender
from rlsys.types import WeightOffer


def actor(rank: int) -> LearnerActor:
    def send(sender: WeightSender, version: int) -> WeightOffer | None:
        tensors = iter([("a", torch.zeros(2)), ("b", torch.zeros(1))])
        return sender.send(tensors, version=version, attempt=2) if rank == 0 else None

    shell = LearnerActor.__new__(LearnerActor)
    shell.learner = SimpleNamespace(send=send, score=lambda rows: [row[1:] * -1.0 for row in rows])
    return shell


def test_rank_0_returns_an_offer_of_what_ray_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_actor.ray, "put", lambda data: f"reference to {data.nbytes} bytes")
    offer = actor(0).send(7, 8)
    assert offer is not None
    assert (offer.manifest.version, offer.manifest.attempt) == (7, 2)
    assert [bucket.bytes for bucket in offer.manifest.buckets] == [8, 4]
    assert offer.payload == ("reference to 8 bytes", "reference to 4 bytes")
    assert actor(1).send(7, 8) is None


def test_scoring_the_probe_stores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_actor.ray, "put", lambda data: pytest.fail("the weights were exported"))
    for rank in (0, 1):
        assert [row.tolist() for row in actor(rank).score([ids(5, 6, 7)])] == [[-6.0, -7.0]]
