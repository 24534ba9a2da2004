"""The Ray shell around a rank: how it sends weights and scores the probe."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from joint_samples import ids

from learners import learner_actor
from learners.learner_actor import LearnerActor
from rlsys.interfaces import WeightSender
from rlsys.transfer.object_store import ObjectStoreSender
from rlsys.transfer.shelf import BucketRequest
from rlsys.weight_types import WeightManifest


def actor(rank: int) -> LearnerActor:
    def send(sender: WeightSender, version: int, members: Sequence[str]) -> WeightManifest | None:
        tensors = iter([("a", torch.zeros(2)), ("b", torch.zeros(1))])
        return sender.send(tensors, version=version, attempt=2, members=members) if rank == 0 else None

    shell = LearnerActor.__new__(LearnerActor)
    shell.sender = ObjectStoreSender(lambda data: f"reference to {data.nbytes} bytes", 8)
    shell.learner = SimpleNamespace(send=send, score=lambda rows: [row[1:] * -1.0 for row in rows])
    return shell


def test_rank_0_returns_the_contents_and_gives_out_the_buckets() -> None:
    first = actor(0)
    manifest = first.send(7, ())
    assert manifest is not None
    assert (manifest.version, manifest.attempt) == (7, 2)
    assert [bucket.bytes for bucket in manifest.buckets] == [8, 4]
    replies = [first.take(BucketRequest(version=7, attempt=2, index=index, member="0.0")) for index in range(3)]
    assert [reply.reference for reply in replies] == ["reference to 8 bytes", "reference to 4 bytes", None]
    assert actor(1).send(7, ()) is None


def test_scoring_the_probe_stores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_actor.ray, "put", lambda data: pytest.fail("the weights were exported"))
    for rank in (0, 1):
        assert [row.tolist() for row in actor(rank).score([ids(5, 6, 7)])] == [[-6.0, -7.0]]
