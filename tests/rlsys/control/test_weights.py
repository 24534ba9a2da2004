"""The weight-sync bus: the order of a publish, refused acknowledgements, and the ledger of versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import PROBE, FakeLearner, FakePool, logprobs

from rlsys.config.schema import WeightSyncConfig
from rlsys.control.probe_check import MAXIMUM_FLOOR, MaximumCheck
from rlsys.control.weights import WeightBus
from rlsys.errors import ConfigError, WeightSyncError
from rlsys.types import Float32Array, Int32Array
from rlsys.weight_types import WeightAck, WeightManifest, WeightOffer


class Setup:
    def __init__(self, actors: int = 2, dtype: str = "fp32", **config: Any) -> None:
        self.calls: list[Any] = []
        self.pool = FakePool(actors, self.calls)
        self.learner = FakeLearner(self.calls)
        self.bus = self.make_bus(self.pool, WeightSyncConfig(**config), dtype)

    def make_bus(self, pool: FakePool, config: WeightSyncConfig | None = None, dtype: str = "fp32") -> WeightBus:
        return WeightBus(self.learner, pool, config or WeightSyncConfig(), dtype, PROBE)

    def publish(self, *versions: int) -> dict[str, float]:
        """Publish versions in order and return the metrics of the last."""

        async def publish_all() -> dict[str, float]:
            metrics: dict[str, float] = {}
            for version in versions:
                metrics = dict(await self.bus.publish(version))
            return metrics

        return asyncio.run(publish_all())

    def answer(self, actor: int, row: int, position: int, offset: float) -> None:
        """Let an actor's log-probability of one probe token differ by `offset`."""
        scores = logprobs(PROBE)
        scores[row][position] += offset
        self.pool.answer[actor] = scores


def test_a_publish_sends_scores_and_updates_every_actor_and_then_counts() -> None:
    setup = Setup()
    metrics = setup.publish(0, 1)
    assert setup.calls == [
        *[("send", 0), ("score_probe", 2), ("update", 0, 0), ("update", 1, 0)],
        *[("send", 1), ("score_probe", 2), ("update", 0, 1), ("update", 1, 1)],
    ]
    assert setup.bus.version == 1
    assert metrics.keys() == {"weights/publish_bytes", "weights/probe_gap_max", "weights/publish_s", "time/publish_s"}
    assert metrics["weights/publish_bytes"] == 16
    assert metrics["weights/probe_gap_max"] == 0
    assert metrics["weights/publish_s"] == metrics["time/publish_s"] > 0


@pytest.mark.parametrize("offered", [4, 3])
def test_versions_only_grow(offered: int) -> None:
    setup = Setup()
    setup.publish(4)
    with pytest.raises(WeightSyncError, match=f"version {offered} was offered after 4"):
        setup.publish(offered)
    assert setup.calls.count(("send", 4)) == 1 and len(setup.calls) == 4  # nothing was sent
    assert setup.bus.version == 4


def test_actors_load_while_the_learner_sends_and_are_judged_when_it_has_scored() -> None:
    setup = Setup()
    go_on = asyncio.Event()
    send = setup.learner.send

    async def slow(version: int, members: Sequence[str]) -> WeightManifest:
        assert members == ["0.0", "1.0"]
        await go_on.wait()
        return await send(version, members)

    class Watching(FakePool):
        async def update_weights(self, actor: int, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck:
            go_on.set()
            return await super().update_weights(actor, offer, probe)

    setup.learner.send = slow  # type: ignore[method-assign]
    setup.bus = setup.make_bus(Watching(2, setup.calls))
    setup.publish(1)
    assert setup.calls == [("update", 0, 1), ("update", 1, 1), ("send", 1), ("score_probe", 2)]


def test_an_interrupted_publish_leaves_no_call_behind() -> None:
    setup = Setup()
    ended: list[str] = []

    async def hang(version: int, members: Sequence[str]) -> WeightManifest:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("send")
        raise AssertionError

    async def main() -> None:
        setup.learner.send = hang  # type: ignore[method-assign]
        publish = asyncio.create_task(setup.bus.publish(1))
        await asyncio.sleep(0.01)
        publish.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publish
        assert ended == ["send"]

    asyncio.run(main())
    assert setup.bus.version is None


def test_a_failed_publish_leaves_the_ledger_as_it_was() -> None:
    setup = Setup()
    setup.publish(0)
    setup.answer(1, 0, 0, 1.0)
    with pytest.raises(WeightSyncError):
        setup.publish(1)
    assert setup.bus.version == 0


@pytest.mark.parametrize(
    ("dtype", "row", "position", "offset"),
    [("fp32", 0, 2, 6e-4), ("fp32", 1, 0, -6e-4), ("fp32", 1, 1, np.nan), ("fp32", 0, 0, -np.inf)],
)
def test_a_gap_above_the_tolerance_names_actor_version_and_token(
    dtype: str, row: int, position: int, offset: float
) -> None:
    setup = Setup(dtype=dtype)
    setup.answer(1, row, position, offset)
    # Position p of the log-probabilities is that of token p + 1 of the row.
    place = rf"actor 1, weight version 7: .* \(probe row {row}, token {position + 1}\)"
    with pytest.raises(WeightSyncError, match=place):
        setup.publish(7)
    assert setup.bus.version is None


@pytest.mark.parametrize(("dtype", "offset"), [("fp32", 4e-4)])
def test_rounding_is_acknowledged_and_reported(dtype: str, offset: float) -> None:
    setup = Setup(dtype=dtype)
    setup.answer(0, 1, 1, -offset)
    # float32 numbers near 1 are 1.2e-7 apart.
    assert setup.publish(1)["weights/probe_gap_max"] == pytest.approx(offset, abs=2e-7)


@pytest.mark.parametrize("answer", [logprobs(PROBE)[:1], [row[:1] for row in logprobs(PROBE)], []])
def test_an_answer_with_fewer_numbers_is_no_agreement(answer: list[Float32Array]) -> None:
    setup = Setup()
    setup.pool.answer[0] = answer
    with pytest.raises(WeightSyncError, match="actor 0, weight version 1: .* inf nats"):
        setup.publish(1)


def test_a_wrong_version_is_refused() -> None:
    setup = Setup()

    async def old(*arguments: Any) -> WeightAck:
        return WeightAck(actor="1", version=2, probe_logprobs=tuple(logprobs(PROBE)))

    setup.pool.update_weights = old
    with pytest.raises(WeightSyncError, match="actor 1 acknowledged version 2, expected 3"):
        setup.publish(3)


def test_weights_of_an_earlier_attempt_of_the_learner_are_refused() -> None:
    setup = Setup()
    setup.publish(3)
    setup.bus.forget()
    setup.learner.restarts = 1
    offer = setup.learner.offer
    setup.learner.offer = lambda version: replace(offer(version), attempt=0)  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="acknowledged weight version 3 of attempt 0 .*, expected attempt 1"):
        setup.publish(3)
    setup.learner.offer = offer  # type: ignore[method-assign]
    setup.publish(3)


@pytest.mark.parametrize(
    ("dtype", "gap", "tolerance"),
    [
        ("fp32", 0.0, 5e-4),  # the floor
        ("fp32", 1e-5, 5e-4),  # 20 * 1e-5 = 2e-4 is below it
        ("fp32", 1e-4, 5e-4),  # 20 * 1e-4 = 2e-3 would let a stale output layer through: the ceiling
    ],
)
def test_calibration_sets_the_tolerance_from_a_fresh_load(dtype: str, gap: float, tolerance: float) -> None:
    setup = Setup(dtype=dtype)
    setup.answer(1, 0, 0, gap)
    assert not setup.bus.calibrated
    assert asyncio.run(setup.bus.calibrate()) == pytest.approx(gap, abs=2e-7)
    assert setup.bus.calibrated
    assert setup.bus.tolerance == pytest.approx(tolerance, rel=1e-2)  # 2e-7 rounding in 1e-4, times 20
    assert setup.bus.version is None  # nothing was published
    assert setup.calls == [("score_probe", 2), ("probe", 0), ("probe", 1)]  # nothing was sent


@pytest.mark.parametrize(("dtype", "gap"), [("fp32", 2e-3), ("fp32", np.nan)])
def test_calibration_refuses_a_gap_beyond_rounding(dtype: str, gap: float) -> None:
    setup = Setup(dtype=dtype)
    setup.answer(0, 1, 0, gap)
    with pytest.raises(WeightSyncError, match="loaded the same files"):
        asyncio.run(setup.bus.calibrate())
    assert not setup.bus.calibrated
    assert setup.bus.tolerance == MAXIMUM_FLOOR


def test_an_explicit_tolerance_stays() -> None:
    setup = Setup(probe_tolerance=0.01)
    setup.answer(0, 0, 0, 5e-3)  # above the ceiling of a fresh load, but the user allows it
    asyncio.run(setup.bus.calibrate())
    assert setup.bus.tolerance == 0.01
    assert setup.publish(1)["weights/probe_gap_max"] == pytest.approx(5e-3, abs=2e-7)
    setup.answer(0, 0, 0, 0.011)
    with pytest.raises(WeightSyncError, match="allowed are 1.00e-02"):
        setup.publish(2)


def test_a_probe_must_test_something() -> None:
    setup = Setup()
    one_token = [np.zeros(1, dtype=np.int32)]
    with pytest.raises(ConfigError, match="two tokens"):
        WeightBus(setup.learner, setup.pool, WeightSyncConfig(), "fp32", one_token)
    bus = WeightBus(setup.learner, setup.pool, WeightSyncConfig(), "fp32", [*one_token, PROBE[0]])
    asyncio.run(bus.publish(0))
    assert bus.version == 0


def drifting(setup: Setup, drift: float, actors: Callable[[int], dict[int, list[Float32Array]]]) -> None:
    """Let the learner's log-probabilities move by `drift` a version.

    Args:
        actors: returns the answers of the actors that do not move with the learner, for a version.
    """
    score = setup.learner.score
    version = iter(range(100))

    async def score_moved(probe: Sequence[Int32Array]) -> list[Float32Array]:
        number = next(version)
        moved = [row - drift * number for row in await score(probe)]
        setup.pool.answer = {**dict.fromkeys(range(setup.pool.count), moved), **actors(number)}
        return moved

    setup.learner.score = score_moved  # type: ignore[method-assign]


def test_old_weights_do_not_pass_if_a_step_moves_less_than_the_tolerance() -> None:
    drift = MAXIMUM_FLOOR / 20
    right = Setup()
    drifting(right, drift, lambda version: {})
    right.publish(*range(10))
    frozen = Setup()
    drifting(frozen, drift, lambda version: {1: logprobs(PROBE)})  # version 0 for ever
    frozen.publish(0)
    with pytest.raises(
        WeightSyncError, match="actor 1 acknowledged weight version 1 but computes with the previous one"
    ):
        frozen.publish(1)


def test_a_step_that_moves_no_further_than_rounding_proves_nothing() -> None:
    setup = Setup()
    setup.bus._check = MaximumCheck()
    setup.bus._check._fresh_gap = 1e-5
    drifting(setup, 1e-5, lambda version: {actor: logprobs(PROBE) for actor in range(2)} if version else {})
    setup.publish(0, 1)
