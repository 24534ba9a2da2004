"""The weight-sync bus: it publishes and verifies weight versions, and knows the served version.

A publish is sent, verified and acknowledged. The learner gathers the weights bucket by bucket, and the actors receive
and load them meanwhile, between two engine steps. Every actor checks names and checksums, and answers with the
log-probabilities of fixed probe rows. The version is acknowledged only if they agree with the learner's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from rlsys.config.schema import WeightSyncConfig
from rlsys.control.dispatch import probe
from rlsys.control.probe_check import largest_gap, probe_check
from rlsys.errors import ConfigError, WeightSyncError
from rlsys.interfaces import Learner, RolloutPool
from rlsys.types import Float32Array, Int32Array
from rlsys.weight_types import WeightAck, WeightManifest, WeightOffer

Judge = Callable[[WeightAck, Sequence[Float32Array]], None]


class LearnerPublication:
    """Publication of the learner's present weights.

    Args:
        learner: sends the weights and scores the probe.
        version: the weight version.
        probe: rows of token ids, `[T]` each.
        judge: raises WeightSyncError if an acknowledgement disagrees with the learner's log-probabilities.
        when_sent: is called when the learner has sent and scored everything, so that it may train on.
    """

    def __init__(
        self, learner: Learner, version: int, probe: Sequence[Int32Array], judge: Judge, when_sent: Callable[[], None]
    ) -> None:
        self._learner, self._version, self._judge = learner, version, judge
        self._when_sent = when_sent
        self.probe, self.serial = probe, learner.shares_device
        self.offer: WeightOffer = learner.offer(version)
        self._work: asyncio.Task[tuple[WeightManifest, Sequence[Float32Array]]] | None = None

    def begin(self, members: Sequence[str]) -> None:
        """Let the learner send its weights, and then score the probe."""
        self._work = asyncio.ensure_future(self._send(members))

    async def _send(self, members: Sequence[str]) -> tuple[WeightManifest, Sequence[Float32Array]]:
        manifest = await self._learner.send(self._version, members)
        scores = await self._learner.score(self.probe)
        self._when_sent()
        return manifest, scores

    @property
    def failed(self) -> bool:
        """Whether the learner could not send the version."""
        work = self._work
        return work is not None and work.done() and (work.cancelled() or work.exception() is not None)

    async def sent(self) -> None:
        """Return when the learner has sent and scored everything."""
        await self.result()

    async def result(self) -> tuple[WeightManifest, Sequence[Float32Array]]:
        """Return the contents of the version and the learner's log-probabilities of the probe."""
        assert self._work is not None  # noqa: S101 - begin comes first
        return await asyncio.shield(self._work)

    async def check(self, ack: WeightAck) -> None:
        """Judge the acknowledgement of an actor."""
        self._judge(ack, (await self.result())[1])

    async def close(self) -> None:
        """Give up what is under way."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)


class WeightBus:
    """Publishes weight versions and knows which version the actors serve.

    Args:
        learner: sends its weights, and scores the probe with them.
        pool: the actors.
        config: tolerance of the verification.
        dtype: "bf16" if the actors or the learner compute in it, else "fp32".
        probe: rows of token ids, `[T]` each, whose log-probabilities are compared.

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
        self._check = probe_check(dtype, config.probe_tolerance)
        self._probe = probe
        self.calibrated = False
        self.version: int | None = None
        self._acknowledged_scores: Sequence[Float32Array] | None = None  # of the learner, for `version`

    @property
    def tolerance(self) -> float:
        """The bound of the gap, as `ProbeCheck` describes it."""
        return self._check.tolerance

    async def calibrate(self) -> float:
        """Set the tolerance from actors that have just loaded the learner's weights from files. Nothing is sent.

        An explicit weight_sync.probe_tolerance stays as it is.

        Returns:
            The largest gap between an actor and the learner, in nats.

        Raises:
            WeightSyncError: the gap is too large to be rounding.
        """
        expected = await self._learner.score(self._probe)
        gap = self._check.calibrate(expected, await probe(self._pool, self._probe))
        self.calibrated = True
        return gap

    def forget(self) -> None:
        """Empty the ledger, because the learner starts again from a checkpoint and may repeat versions."""
        self.version = self._acknowledged_scores = None

    async def publish(self, version: int, when_sent: Callable[[], None] = lambda: None) -> Mapping[str, float]:
        """Bring every actor to the learner's present weights as `version`.

        Returns when all live actors have acknowledged the version.

        Args:
            version: the weight version.
            when_sent: is called when the learner may train on, while actors still load.

        Returns:
            Values by metric name.

        Raises:
            WeightSyncError: no actor acknowledged; names actor, tensor and version.
        """
        if self.version is not None and version <= self.version:
            raise WeightSyncError(f"weight version {version} was offered after {self.version}; versions only grow")
        started, gaps = time.monotonic(), [0.0]
        attempt = self._learner.restarts  # a replaced actor may acknowledge after the next attempt has begun

        def judge(ack: WeightAck, expected: Sequence[Float32Array]) -> None:
            self._check_version(ack, version, attempt)
            gaps.append(self._check_gap(ack, expected))
            self._check_moved(ack, expected)

        publication = LearnerPublication(self._learner, version, self._probe, judge, when_sent)
        try:
            await self._pool.publish(publication)
            manifest, expected = await publication.result()
        finally:
            await publication.close()
        self.version, self._acknowledged_scores = version, expected
        seconds = time.monotonic() - started
        return {
            "weights/publish_bytes": manifest.bytes,
            "weights/publish_s": seconds,
            "time/publish_s": seconds,
            "weights/probe_gap_max": max(gaps),
        }

    def _check_version(self, ack: WeightAck, version: int, attempt: int) -> None:
        if ack.version != version:
            raise WeightSyncError(f"actor {ack.actor} acknowledged version {ack.version}, expected {version}")
        if ack.attempt != attempt:
            raise WeightSyncError(
                f"actor {ack.actor} acknowledged weight version {version} of attempt {ack.attempt} of the learner, "
                f"expected attempt {attempt}"
            )

    def _check_gap(self, ack: WeightAck, expected: Sequence[Float32Array]) -> float:
        """Return the largest gap in nats; raise if the check rejects the answer."""
        if problem := self._check.problem(expected, ack.probe_logprobs):
            raise WeightSyncError(
                f"actor {ack.actor}, weight version {ack.version}: {problem}. All tensors arrived with the right "
                "checksum, so the engine computes with others: an output layer tied to the embedding (lm_head.weight) "
                "that was not sent is the usual cause"
            )
        return largest_gap(expected, ack.probe_logprobs)[0]

    def _check_moved(self, ack: WeightAck, expected: Sequence[Float32Array]) -> None:
        """Raise if an actor still computes with the previous version, although its gap is within the tolerance.

        A step may change the scores by less than the tolerance. An actor with old weights is then detected because its
        scores are nearer to the old scores. The comparison is made only if the scores moved further than rounding.
        Otherwise rounding could bring the scores of the right weights nearer to the old ones.
        """
        previous = self._acknowledged_scores
        distances = self._check.distances(expected, previous, ack.probe_logprobs) if previous else None
        if distances and distances[0] > distances[1]:
            raise WeightSyncError(
                f"actor {ack.actor} acknowledged weight version {ack.version} but computes with the previous one: its "
                f"log-probabilities are {distances[0]:.2e} nats from the learner's, and {distances[1]:.2e} from those "
                "of the previous version"
            )
