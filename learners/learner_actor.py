"""Thin Ray shell around one DeepSpeed rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import ray

from learners.rank_settings import RankSettings
from rlsys.config import OptimizerConfig
from rlsys.process import die_with_parent, quiet_worker
from rlsys.types import Demonstration, Float32Array, Int32Array, TrajectoryGroup, WeightManifest

logger = logging.getLogger(__name__)


class LearnerActor:
    """One rank. Every method is called on all ranks at once and returns the same figures on each."""

    def __init__(self, settings: RankSettings, log_file: str) -> None:
        quiet_worker(log_file)
        die_with_parent()
        from learners.deepspeed_engine import PolicyEngine  # not on the driver, which only makes handles

        self.rank = settings.rank
        try:
            self.policy = PolicyEngine(settings)
        except Exception:
            logger.exception("learner rank %d could not start", settings.rank)
            raise

    def start_stage(
        self,
        policy: Path,
        optimizer: OptimizerConfig,
        total_updates: int,
        resume: Path | None,
        reference: Path | None,
    ) -> None:
        self.policy.start_stage(policy, optimizer, total_updates, resume, reference)

    def train_online(self, groups: Sequence[TrajectoryGroup], updates: int, version: int) -> dict[str, float]:
        return self.policy.train_online(groups, updates, version)

    def train_supervised(self, rows: Sequence[Demonstration], version: int) -> dict[str, float]:
        return self.policy.train_supervised(rows, version)

    def export(
        self, version: int, bucket_bytes: int, probe: Sequence[Int32Array]
    ) -> tuple[WeightManifest, list[ray.ObjectRef], list[Float32Array]] | None:
        """Put the policy into the object store, bucket by bucket. Rank 0 answers, the others None."""
        buckets, references = [], []
        for bucket, data in self.policy.export(bucket_bytes):
            buckets.append(bucket)
            references.append(ray.put(data))
        scores = self.policy.score(probe)
        return (WeightManifest(version=version, buckets=tuple(buckets)), references, scores) if self.rank == 0 else None

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
