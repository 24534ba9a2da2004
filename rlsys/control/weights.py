"""The weight-sync bus: the one owner of the version ledger. A publish is sent, verified and acknowledged.

How bytes travel is the channel's business. The one there is uses Ray's object store: the learner puts its
full parameters there in buckets; every actor fetches them, checks names and checksums, loads them between two
engine steps, and answers with the log-probabilities of fixed probe rows. Only if those agree with the learner's
is the version acknowledged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlsys.config.schema import WeightSyncConfig
from rlsys.errors import ConfigError, WeightSyncError
from rlsys.interfaces import Learner, RolloutPool, Verify, WeightChannel
from rlsys.types import Float32Array, Int32Array, WeightAck, WeightManifest

# Largest gap in nats that rounding alone explains after many updates. A stale output layer exceeds the
# first even when every weight moved by only 1e-4 (measured: 2.5e-3).
TOLERANCE_FLOOR = {"fp32": 5e-4, "bf16": 0.1}
TOLERANCE_FACTOR = 20.0
# A fresh load that differs by more than this is not rounding: actor and learner do not compute the same model.
FRESH_LOAD_CEILING = {"fp32": 5e-4, "bf16": 0.5}


class ObjectStoreChannel:
    """WeightChannel through Ray's object store: one copy a node, cross-node transfer is Ray's.

    The buckets of a version stay referenced until the next one has been acknowledged.
    """

    def __init__(self, learner: Learner, pool: RolloutPool) -> None:
        self._learner = learner
        self._pool = pool
        self._held: Sequence[Any] = ()

    async def transfer(self, version: int, probe: Sequence[Int32Array], verify: Verify) -> WeightManifest:
        manifest, references, expected = await self._learner.export(version, probe)
        await self._pool.publish(manifest, references, probe, lambda ack: verify(ack, expected))
        self._held = references
        return manifest


class WeightBus:
    """Publishes versions and knows which one is served.

    Args:
        dtype: "bf16" where actors or learner compute in it, else "fp32".
        probe: rows of token ids whose log-probabilities are compared.
    Raises:
        ConfigError: no row has a token to predict.
    """

    def __init__(
        self,
        learner: Learner,
        pool: RolloutPool,
        config: WeightSyncConfig,
        dtype: str,
        probe: Sequence[Int32Array],
    ) -> None:
        if max(len(row) for row in probe) < 2:
            raise ConfigError("no held-out prompt has two tokens or more: a publish could not be verified with them")
        self._learner = learner
        self._pool = pool
        self._config = config
        self._floor = TOLERANCE_FLOOR[dtype]
        self._ceiling = FRESH_LOAD_CEILING[dtype]
        self._probe = probe
        self._channel: WeightChannel = ObjectStoreChannel(learner, pool)
        self.tolerance = config.probe_tolerance or self._floor
        self.calibrated = False
        self.version: int | None = None
        self._before: Sequence[Float32Array] | None = None
        self._fresh_gap = 0.0

    async def calibrate(self) -> float:
        """Set the tolerance from actors that have just loaded the learner's weights from files.

        Returns the largest gap found. An explicit weight_sync.probe_tolerance stays as it is.

        Raises:
            WeightSyncError: the gap is too large to be rounding.
        """
        _, _, expected = await self._learner.export(0, self._probe)
        answers = await asyncio.gather(*(self._pool.probe(actor, self._probe) for actor in range(self._pool.count)))
        gap = max(_largest_gap(expected, answer)[0] for answer in answers)
        if not gap <= max(self._ceiling, self._config.probe_tolerance or 0.0):
            raise WeightSyncError(
                f"actors and learner loaded the same files and their log-probabilities differ by {gap:.2e} nats "
                f"(at most {self._ceiling:.0e} is rounding): the engine computes this architecture differently"
            )
        self.calibrated, self._fresh_gap = True, gap
        if self._config.probe_tolerance is None:
            self.tolerance = min(max(self._floor, TOLERANCE_FACTOR * gap), self._ceiling)
        return gap

    def forget(self) -> None:
        """The learner begins again from a checkpoint: the next publish is the first of its versions."""
        self.version = self._before = None

    async def publish(self, version: int) -> Mapping[str, float]:
        """Bring every actor to the learner's present weights as `version`.

        Returns when all that live have acknowledged. The buckets of the version before are released then.

        Raises:
            WeightSyncError: naming actor, tensor and version, where no actor acknowledged.
        """
        if self.version is not None and version <= self.version:
            raise WeightSyncError(f"weight version {version} was offered after {self.version}; versions only grow")
        started, gaps = time.monotonic(), [0.0]
        attempt = self._learner.restarts  # a replaced actor may acknowledge while the next one begins
        probed: list[Sequence[Float32Array]] = [()]

        def verify(ack: WeightAck, expected: Sequence[Float32Array]) -> None:
            probed[0] = expected
            gaps.append(self._verify(ack, version, attempt, expected))

        manifest = await self._channel.transfer(version, self._probe, verify)
        self.version, self._before = version, probed[0]
        seconds = time.monotonic() - started
        figures = {"weights/publish_bytes": manifest.bytes, "weights/publish_s": seconds, "time/publish_s": seconds}
        return {**figures, "weights/probe_gap_max": max(gaps)}

    def _verify(self, ack: WeightAck, version: int, attempt: int, expected: Sequence[Float32Array]) -> float:
        if ack.version != version:
            raise WeightSyncError(f"actor {ack.actor} acknowledged version {ack.version}, expected {version}")
        if ack.attempt != attempt:
            raise WeightSyncError(
                f"actor {ack.actor} acknowledged weight version {version} of attempt {ack.attempt} of the learner, "
                f"expected attempt {attempt}"
            )
        gap, row, position = _largest_gap(expected, ack.probe_logprobs)
        if not gap <= self.tolerance:
            raise WeightSyncError(
                f"actor {ack.actor}, weight version {version}: log-probabilities differ from the learner's by "
                f"{gap:.2e} nats (probe row {row}, token {position}), allowed are {self.tolerance:.2e}. All tensors "
                "arrived with the right checksum, so the engine computes with others: an output layer tied to the "
                "embedding (lm_head.weight) that was not sent is the usual cause"
            )
        self._check_moved(ack, expected)
        return gap

    def _check_moved(self, ack: WeightAck, expected: Sequence[Float32Array]) -> None:
        """A step may move less than the tolerance. Then old weights would pass, but they are nearer to the old ones.

        Only where the step moved further, in the mean, than twice the largest gap of a fresh load: then rounding
        cannot bring right weights nearer to the old ones.
        """
        if not self._before or _mean_gap(expected, self._before) <= 2 * self._fresh_gap:
            return
        new, old = (_mean_gap(ack.probe_logprobs, each) for each in (expected, self._before))
        if new > old:
            raise WeightSyncError(
                f"actor {ack.actor} acknowledged weight version {ack.version} and computes with the one before: its "
                f"log-probabilities are {new:.2e} nats from the learner's, and {old:.2e} from those of that version"
            )


def _mean_gap(left: Sequence[Float32Array], right: Sequence[Float32Array]) -> float:
    return float(np.mean(np.abs(np.concatenate(left) - np.concatenate(right)), dtype=np.float64))


def _largest_gap(expected: Sequence[Float32Array], found: Sequence[Float32Array]) -> tuple[float, int, int]:
    """(largest absolute difference, its row, its token); NaN and missing numbers count as infinite."""
    if [row.shape for row in expected] != [row.shape for row in found]:
        return np.inf, 0, 0
    worst = (-1.0, 0, 0)
    for row, (left, right) in enumerate(zip(expected, found, strict=True)):
        if not left.size:  # a row of one token predicts nothing
            continue
        gaps = np.nan_to_num(np.abs(left - right), nan=np.inf)
        position = int(gaps.argmax())
        worst = max(worst, (float(gaps[position]), row, position + 1))
    return worst
