"""The weight-sync bus: order of a publish, what refuses to be acknowledged, and the ledger of versions."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import PROBE, FakeLearner, FakePool, logprobs

from rlsys.config.schema import WeightSyncConfig
from rlsys.control.weights import TOLERANCE_FLOOR, WeightBus
from rlsys.errors import ConfigError, WeightSyncError
from rlsys.types import Float32Array, Int32Array, WeightAck, WeightManifest


class Setup:
    def __init__(self, actors: int = 2, dtype: str = "fp32", **config: Any) -> None:
        self.calls: list[Any] = []
        self.pool = FakePool(actors, self.calls)
        self.learner = FakeLearner(self.calls)
        self.bus = WeightBus(self.learner, self.pool, WeightSyncConfig(**config), dtype, PROBE)

    def publish(self, *versions: int) -> dict[str, float]:
        async def all_of_them() -> dict[str, float]:
            found: dict[str, float] = {}
            for version in versions:
                found = dict(await self.bus.publish(version))
            return found

        return asyncio.run(all_of_them())

    def answer(self, actor: int, row: int, position: int, offset: float) -> None:
        """Let an actor's log-probability of one probe token differ by `offset`."""
        found = logprobs(PROBE)
        found[row][position] += offset
        self.pool.answer[actor] = found


def test_a_publish_exports_updates_every_actor_and_then_counts() -> None:
    setup = Setup()
    figures = setup.publish(0, 1)
    assert setup.calls == [
        ("export", 0),
        ("update", 0, 0),
        ("update", 1, 0),
        ("export", 1),
        ("update", 0, 1),
        ("update", 1, 1),
    ]
    assert setup.bus.version == 1
    assert figures["weights/publish_bytes"] == 16
    assert figures["weights/probe_gap_max"] == 0
    assert figures["weights/publish_s"] == figures["time/publish_s"] > 0


@pytest.mark.parametrize("offered", [4, 3])
def test_versions_only_grow(offered: int) -> None:
    setup = Setup()
    setup.publish(4)
    with pytest.raises(WeightSyncError, match=f"version {offered} was offered after 4"):
        setup.publish(offered)
    assert len(setup.calls) == 3  # nothing was exported
    assert setup.bus.version == 4


class Reference:
    """An object store reference; the object is gone when nobody holds it."""


def test_references_are_held_until_the_next_version_is_acknowledged() -> None:
    setup = Setup(actors=2)
    exported: list[weakref.ref[Reference]] = []
    alive: list[list[bool]] = []

    def reference() -> Reference:
        made = Reference()
        exported.append(weakref.ref(made))
        return made

    class Watching(FakePool):
        async def update_weights(
            self, actor: int, manifest: WeightManifest, references: Sequence[Any], probe: Sequence[Int32Array]
        ) -> WeightAck:
            ack = await super().update_weights(actor, manifest, references, probe)
            alive.append([found() is not None for found in exported])
            return ack

    setup.learner.reference = reference
    setup.bus = WeightBus(setup.learner, Watching(2, setup.calls), WeightSyncConfig(), "fp32", PROBE)
    setup.publish(0, 1, 2)
    # While an actor loads version n, versions n - 1 and n exist; what is older is gone.
    assert alive == [[True]] * 2 + [[True, True]] * 2 + [[False, True, True]] * 2
    assert [found() is not None for found in exported] == [False, False, True]


def test_a_failed_publish_leaves_the_ledger_as_it_was() -> None:
    setup = Setup()
    setup.publish(0)
    setup.answer(1, 0, 0, 1.0)
    with pytest.raises(WeightSyncError):
        setup.publish(1)
    assert setup.bus.version == 0


@pytest.mark.parametrize(
    ("dtype", "row", "position", "offset"),
    [("fp32", 0, 2, 6e-4), ("fp32", 1, 0, -6e-4), ("fp32", 1, 1, np.nan), ("fp32", 0, 0, -np.inf), ("bf16", 0, 1, 0.2)],
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


@pytest.mark.parametrize(("dtype", "offset"), [("fp32", 4e-4), ("bf16", 0.09)])
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


def test_weights_of_a_learner_that_is_no_more_are_refused() -> None:
    setup = Setup()
    setup.publish(3)
    setup.bus.forget()
    setup.learner.restarts = 1
    exported = setup.learner.export

    async def old(*arguments: Any) -> Any:
        manifest, *rest = await exported(*arguments)
        return replace(manifest, attempt=0), *rest

    setup.learner.export = old
    with pytest.raises(WeightSyncError, match="acknowledged weight version 3 of attempt 0 .*, expected attempt 1"):
        setup.publish(3)
    setup.learner.export = exported
    setup.publish(3)


@pytest.mark.parametrize(
    ("dtype", "gap", "tolerance"),
    [
        ("fp32", 0.0, 5e-4),  # the floor
        ("fp32", 1e-5, 5e-4),  # 20 * 1e-5 = 2e-4 is below it
        ("fp32", 1e-4, 5e-4),  # 20 * 1e-4 = 2e-3 would let a stale output layer through: the ceiling
        ("bf16", 0.02, 0.4),
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
    assert setup.calls == [("export", 0), ("probe", 0), ("probe", 1)]


@pytest.mark.parametrize(("dtype", "gap"), [("fp32", 2e-3), ("bf16", 0.6), ("fp32", np.nan)])
def test_calibration_refuses_what_is_no_rounding(dtype: str, gap: float) -> None:
    setup = Setup(dtype=dtype)
    setup.answer(0, 1, 0, gap)
    with pytest.raises(WeightSyncError, match="loaded the same files"):
        asyncio.run(setup.bus.calibrate())
    assert not setup.bus.calibrated
    assert setup.bus.tolerance == TOLERANCE_FLOOR[dtype]


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


def moving(setup: Setup, drift: float) -> None:
    """The learner's log-probabilities move by `drift` a version, and the actors' with them."""
    export = setup.learner.export

    async def drifting(version: int, probe: Sequence[Int32Array]) -> Any:
        manifest, references, found = await export(version, probe)
        moved = [row - drift * version for row in found]
        setup.pool.answer = dict.fromkeys(range(setup.pool.count), moved)
        return manifest, references, moved

    setup.learner.export = drifting  # type: ignore[method-assign]


def test_old_weights_do_not_pass_where_a_step_moves_less_than_the_tolerance() -> None:
    drift = TOLERANCE_FLOOR["fp32"] / 20
    fresh = Setup()
    moving(fresh, drift)
    fresh.publish(*range(10))
    setup = Setup()
    setup.pool.answer[1] = logprobs(PROBE)  # of version 0, for ever
    frozen = setup.pool.answer[1]
    moving(setup, drift)
    export = setup.learner.export

    async def with_frozen(version: int, probe: Sequence[Int32Array]) -> Any:
        found = await export(version, probe)
        setup.pool.answer[1] = frozen
        return found

    setup.learner.export = with_frozen  # type: ignore[method-assign]
    setup.publish(0)
    with pytest.raises(WeightSyncError, match="actor 1 acknowledged weight version 1 and computes with the one before"):
        setup.publish(1)


def test_a_step_that_moves_no_further_than_rounding_proves_nothing() -> None:
    setup = Setup()
    setup.bus._fresh_gap = 1e-5
    moving(setup, 1e-5)
    setup.publish(0)
    setup.pool.answer = {}
    export = setup.learner.export

    async def unmoved(version: int, probe: Sequence[Int32Array]) -> Any:
        found = await export(version, probe)
        setup.pool.answer = {actor: logprobs(PROBE) for actor in range(2)}
        return found

    setup.learner.export = unmoved  # type: ignore[method-assign]
    setup.publish(1)
