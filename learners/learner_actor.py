"""Ray shell around one DeepSpeed rank."""

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
from rlsys.interfaces import TokenValues, WeightSender
from rlsys.processes import die_with_parent, quiet_worker
from rlsys.transfer.collective import CollectiveSender
from rlsys.transfer.object_store import ObjectStoreSender
from rlsys.transfer.shelf import BucketReply, BucketRequest
from rlsys.types import Float32Array, Int32Array, Preference, TrainingBatch
from rlsys.weight_types import WeightManifest

WATCH = "watch"  # concurrency group of the calls that are answered while another call runs
TRANSFER = "transfer"  # concurrency group of the calls by which actors take weights

logger = logging.getLogger(__name__)


class LearnerActor:
    """Ray actor of one rank. Calls for training go to all ranks at once. Only the results of `send` differ."""

    def __init__(self, settings: RankSettings, log_file: str) -> None:
        quiet_worker(log_file)
        die_with_parent()
        from learners.cpu_products import fast_products  # not at the top: the driver imports this module without torch
        from learners.rank import LearnerRank

        identify("learner", settings.rank, settings.attempt)
        self.sender = weight_sender(settings)
        if settings.device == "cpu":
            fast_products()
        try:
            self.learner = LearnerRank(settings)
        except Exception:
            logger.exception("learner rank %d could not start", settings.rank)
            raise

    @ray.method(concurrency_group=WATCH)
    def place(self) -> tuple[str, int]:
        """Return host and process id."""
        return socket.gethostname(), os.getpid()

    @ray.method(concurrency_group=WATCH)
    def progress(self) -> int:
        """Return the number of model passes so far; answered while another call runs."""
        return self.learner.passes

    def start_stage(self, stage: StageSettings, policy: Path, resume: Path | None, reference: Path | None) -> None:
        self.learner.start_stage(stage, policy, resume, reference)

    def train(self, batch: TrainingBatch, step: int, version: int) -> dict[str, float]:
        return self.learner.train(batch, step, version)

    def token_values(self) -> list[TokenValues | None]:
        return self.learner.token_values()

    def score_pairs(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        return self.learner.score_pairs(pairs)

    def score(self, probe: Sequence[Int32Array]) -> list[Float32Array]:
        """Return the log-probabilities of given rows under the present policy, `[T-1]` each."""
        return self.learner.score(probe)

    def send(self, version: int, members: Sequence[str]) -> WeightManifest | None:
        """Send the policy to the actors. Rank 0 returns the contents, the other ranks None."""
        fault("learner.export", version=version)
        return self.learner.send(self.sender, version, members)

    @ray.method(concurrency_group=TRANSFER)
    def take(self, request: BucketRequest) -> BucketReply:
        """Answer an actor's question for a bucket of weights; answered while another call runs."""
        return self.sender.take(request)

    def sleep(self) -> None:
        """Free the device: all states go to the host."""
        self.learner.sleep()

    def wake(self) -> None:
        """Take the device back."""
        self.learner.wake()

    def save(self, folder: Path) -> None:
        self.learner.save(folder)


def weight_sender(settings: RankSettings) -> WeightSender:
    """Return the sender of the configured transport."""
    config = settings.weight_sync
    bucket_bytes = int(config.bucket_mib * 2**20)
    if config.transport == "object_store":
        return ObjectStoreSender(ray.put, bucket_bytes)
    return CollectiveSender(
        ray.put,
        bucket_bytes,
        device=settings.device,
        rendezvous=settings.store,
        workers=settings.engine_workers,
        timeout_s=config.timeout_s,
    )
