"""Thin Ray shell around one DeepSpeed rank."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import ray

from learners.settings import RankSettings
from rlsys.config.stages import StageSettings
from rlsys.fault_injection import fault, identify
from rlsys.processes import die_with_parent, quiet_worker
from rlsys.types import Float32Array, Int32Array, Preference, TrainingBatch, WeightManifest

WATCH = "watch"  # the concurrency group of calls that do not wait for others

logger = logging.getLogger(__name__)


class LearnerActor:
    """One rank. Every method is called on all ranks at once and returns the same figures on each."""

    def __init__(self, settings: RankSettings, log_file: str) -> None:
        quiet_worker(log_file)
        die_with_parent()
        from learners.rank import LearnerRank  # not on the driver, which only makes handles

        identify("learner", settings.rank, settings.attempt)
        self.rank, self.attempt = settings.rank, settings.attempt
        try:
            self.learner = LearnerRank(settings)
        except Exception:
            logger.exception("learner rank %d could not start", settings.rank)
            raise

    @ray.method(concurrency_group=WATCH)
    def place(self) -> tuple[str, int]:
        """Host and process id."""
        return socket.gethostname(), os.getpid()

    @ray.method(concurrency_group=WATCH)
    def progress(self) -> int:
        """Grows with every pass of a model; answered while other calls are under way."""
        return self.learner.passes

    def start_stage(self, stage: StageSettings, policy: Path, resume: Path | None, reference: Path | None) -> None:
        self.learner.start_stage(stage, policy, resume, reference)

    def train(self, batch: TrainingBatch, step: int, version: int) -> dict[str, float]:
        return self.learner.train(batch, step, version)

    def score_pairs(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        return self.learner.score_pairs(pairs)

    def export(
        self, version: int, bucket_bytes: int, probe: Sequence[Int32Array]
    ) -> tuple[WeightManifest, list[ray.ObjectRef], list[Float32Array]] | None:
        """Put the policy into the object store, bucket by bucket. Rank 0 answers, the others None."""
        fault("learner.export", version=version)
        found = self.learner.export(bucket_bytes, ray.put)
        scores = self.learner.score(probe)
        if self.rank:
            return None
        buckets = tuple(bucket for bucket, _ in found)
        manifest = WeightManifest(version=version, attempt=self.attempt, buckets=buckets)
        return manifest, [reference for _, reference in found], scores

    def save(self, folder: Path) -> None:
        self.learner.save(folder)
