"""The shell around a rank: what it makes of an export."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from joint_samples import ids

from learners import learner_actor
from learners.learner_actor import LearnerActor
from rlsys.types import TensorSpec, WeightBucket


def actor(rank: int) -> LearnerActor:
    bucket = WeightBucket(tensors=(TensorSpec(name="w", shape=(3,), dtype="uint8"),), sha256="", bytes=3)

    def export(bucket_bytes: int, put: Callable[[np.ndarray], Any]) -> list[tuple[WeightBucket, Any]]:
        return [(bucket, put(np.arange(3, dtype=np.uint8)))] if rank == 0 else []

    found = LearnerActor.__new__(LearnerActor)
    found.rank, found.attempt = rank, 2
    found.learner = SimpleNamespace(export=export, score=lambda rows: [np.ones(len(rows[0]) - 1)])
    return found


def test_rank_0_answers_with_what_was_put_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_actor.ray, "put", lambda data: f"reference to {data.nbytes} bytes")
    found = actor(0).export(7, 2**20, [ids(5, 6, 7)])
    assert found is not None
    manifest, references, scores = found
    assert (manifest.version, manifest.attempt, [bucket.bytes for bucket in manifest.buckets]) == (7, 2, [3])
    assert references == ["reference to 3 bytes"]
    assert [row.shape for row in scores] == [(2,)]
    assert actor(1).export(7, 2**20, [ids(5, 6, 7)]) is None
