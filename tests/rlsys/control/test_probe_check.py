"""Bounds of the gap in bf16: rounding of healthy runs passes, whatever single tokens do; wrong weights do not."""

from __future__ import annotations

import numpy as np
import pytest

from rlsys.control.probe_check import (
    SPREAD_CEILING,
    SPREAD_FACTOR,
    SPREAD_FLOOR,
    MaximumCheck,
    SpreadCheck,
    probe_check,
)
from rlsys.errors import WeightSyncError
from rlsys.types import Float32Array

TOKENS = 300
NOISE = 0.013  # measured: mean gap in nats of a tiny bf16 model and engine


def scores(seed: int = 0, size: float = -6.0) -> list[Float32Array]:
    draw = np.random.default_rng(seed)
    return [(size + draw.normal(size=TOKENS // 3)).astype(np.float32) for _ in range(3)]


def rounded(expected: list[Float32Array], seed: int, noise: float = NOISE) -> list[Float32Array]:
    """Return scores with normal errors whose mean absolute value is `noise`."""
    draw, sigma = np.random.default_rng(seed), noise * np.sqrt(np.pi / 2)
    return [(row + sigma * draw.normal(size=row.size)).astype(np.float32) for row in expected]


def calibrated(noise: float = NOISE) -> SpreadCheck:
    check, expected = SpreadCheck(), scores()
    check.calibrate(expected, [rounded(expected, 1, noise), rounded(expected, 2, noise)])
    return check


def test_the_dtype_and_an_explicit_tolerance_choose_the_check() -> None:
    assert isinstance(probe_check("bf16", None), SpreadCheck)
    assert isinstance(probe_check("fp32", None), MaximumCheck)
    explicit = probe_check("bf16", 0.3)
    assert isinstance(explicit, MaximumCheck) and explicit.tolerance == 0.3


@pytest.mark.parametrize("seed", range(20))
def test_single_tokens_far_off_are_rounding(seed: int) -> None:
    expected = scores(seed)
    answer = rounded(expected, 100 + seed)
    answer[0][5] += 1.0  # one token of 300
    answer[2][7] -= 0.5
    assert calibrated().problem(expected, answer) == ""


def test_the_gap_may_grow_with_the_size_of_the_scores() -> None:
    check = calibrated()
    improbable = scores(3, size=-30.0)
    assert check.problem(improbable, rounded(improbable, 4, noise=5 * NOISE)) == ""
    assert check.problem(scores(3, size=-0.5), rounded(scores(3, size=-0.5), 4, noise=0.5)) != ""


@pytest.mark.parametrize("kind", ["many tokens a little", "some tokens a lot"])
def test_mean_and_quantile_are_judged(kind: str) -> None:
    check, expected = calibrated(), scores(5)
    answer = [row.copy() for row in expected]
    for row in answer:
        if kind == "many tokens a little":
            row += 0.3  # 0.05 of 6 nats, more than the bound of the mean
        else:
            row[: row.size // 10] += 1.0
    problem = check.problem(expected, answer)
    assert "of their size in the mean, allowed are" in problem and "95% quantile" in problem


def test_the_bounds_follow_from_a_fresh_load_between_floor_and_ceiling() -> None:
    assert calibrated(1e-4)._bounds.mean == SPREAD_FLOOR[0]
    noise = 0.06  # of 6 nats: 0.01
    assert calibrated(noise)._bounds.mean == pytest.approx(SPREAD_FACTOR * 0.01, rel=0.15)
    assert calibrated(0.4)._bounds.mean == SPREAD_CEILING[0]
    with pytest.raises(WeightSyncError, match="loaded the same files .* in the mean"):
        calibrated(1.0)


@pytest.mark.parametrize("damage", ["nan", "missing"])
def test_an_answer_without_numbers_is_no_agreement(damage: str) -> None:
    expected = scores()
    answer = [row.copy() for row in expected]
    if damage == "nan":
        answer[1][0] = np.nan
    else:
        answer = answer[:2]
    assert "inf of their size" in calibrated().problem(expected, answer)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("step", [0.03, 0.1])
def test_the_previous_version_is_told_from_the_new_one_although_both_are_within_the_bounds(
    seed: int, step: float
) -> None:
    check, previous = calibrated(), scores(seed)
    draw = np.random.default_rng(50 + seed)
    expected = [(row + step * draw.normal(size=row.size)).astype(np.float32) for row in previous]
    for answer, stale in ((rounded(expected, seed), False), (rounded(previous, seed), True)):
        assert check.problem(expected, answer) == ""
        distances = check.distances(expected, previous, answer)
        assert distances is not None and (distances[0] > distances[1]) is stale


def test_a_step_that_is_lost_in_rounding_proves_nothing() -> None:
    check, previous = calibrated(), scores()
    expected = [row + np.float32(5e-4) for row in previous]
    assert check.distances(expected, previous, rounded(previous, 9)) is None
