"""The comparison of an actor's log-probabilities of the probe with the learner's.

In fp32, one number too far off shows wrong weights. In bf16, rounding alone puts single tokens far off, the more the
less probable they are. So the mean and a quantile over many tokens are judged there, each relative to the size of the
log-probability, and both by the values of weights that actor and learner have just loaded from the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlsys.errors import WeightSyncError
from rlsys.types import Float32Array

MAXIMUM_FLOOR = 5e-4
"""Largest gap in nats that rounding alone explains after many updates in fp32.

A stale output layer exceeds the value even if every weight moved by only 1e-4 (measured: 2.5e-3).
"""
MAXIMUM_FACTOR = 20.0
MAXIMUM_CEILING = 5e-4
"""Largest gap in nats after both sides loaded the same files. A larger gap shows that they compute differently."""

QUANTILE = 0.95
PROBE_TOKENS = 256
"""Tokens that mean and quantile need at least, if there are so many held-out prompts."""
SPREAD_FLOOR = (0.02, 0.08)
"""Mean and quantile of the relative gap in bf16 that rounding explains in any case after many updates."""
SPREAD_FACTOR = 4.0
SPREAD_CEILING = (0.1, 0.4)
"""Mean and quantile of the relative gap in bf16 after both sides loaded the same files, at most."""
MOVEMENT_FACTOR = 20.0
"""Movement of the scores, in standard errors of rounding, from which the previous version can be told from a new one.

Half of it separates the two, and rounding may have doubled since the fresh load: 5 standard errors are left.
"""
DIFFERENT = "the engine computes this architecture differently"

Scores = Sequence[Float32Array]


class ProbeCheck(Protocol):
    """Bounds of the gap between an actor and the learner."""

    @property
    def tolerance(self) -> float:
        """The bound of the gap that messages and the log show."""
        ...

    def calibrate(self, expected: Scores, answers: Sequence[Scores]) -> float:
        """Set the bounds from actors that have just loaded the learner's weights from files; return the largest gap.

        Raises:
            WeightSyncError: the gap is too large to be rounding.
        """
        ...

    def problem(self, expected: Scores, answer: Scores) -> str:
        """Return the reason to reject an answer, or ""."""
        ...

    def distances(self, expected: Scores, previous: Scores, answer: Scores) -> tuple[float, float] | None:
        """Return the distances of an answer from the learner's scores and from those of the previous version, in nats.

        None if the step moved the scores so little that rounding could bring right ones nearer to the previous ones.
        """
        ...


class MaximumCheck:
    """Bound of the largest gap of a token, in nats.

    Args:
        tolerance: weight_sync.probe_tolerance; None to set it by a fresh load.
        ceiling: largest gap of a fresh load.
    """

    def __init__(self, tolerance: float | None = None, ceiling: float = MAXIMUM_CEILING) -> None:
        self._explicit = tolerance
        self._ceiling = ceiling
        self._fresh_gap = 0.0
        self.tolerance = tolerance or MAXIMUM_FLOOR

    def calibrate(self, expected: Scores, answers: Sequence[Scores]) -> float:
        gap = max(largest_gap(expected, answer)[0] for answer in answers)
        if not gap <= max(self._ceiling, self._explicit or 0.0):
            raise WeightSyncError(
                f"actors and learner loaded the same files and their log-probabilities differ by {gap:.2e} nats "
                f"(at most {self._ceiling:.0e} is rounding): {DIFFERENT}"
            )
        self._fresh_gap = gap
        if self._explicit is None:
            self.tolerance = min(max(MAXIMUM_FLOOR, MAXIMUM_FACTOR * gap), self._ceiling)
        return gap

    def problem(self, expected: Scores, answer: Scores) -> str:
        gap, row, position = largest_gap(expected, answer)
        if gap <= self.tolerance:
            return ""
        return (
            f"log-probabilities differ from the learner's by {gap:.2e} nats (probe row {row}, token {position}), "
            f"allowed are {self.tolerance:.2e}"
        )

    def distances(self, expected: Scores, previous: Scores, answer: Scores) -> tuple[float, float] | None:
        if mean_gap(expected, previous) <= 2 * self._fresh_gap:
            return None
        return mean_gap(answer, expected), mean_gap(answer, previous)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and quantile of the relative gap |actor - learner| / max(1, |learner|) over all tokens of the probe."""

    mean: float
    quantile: float

    @staticmethod
    def of(expected: Scores, answer: Scores) -> Spread:
        if largest_gap(expected, answer)[0] == np.inf:
            return Spread(np.inf, np.inf)
        learner, actor = np.concatenate(expected).astype(np.float64), np.concatenate(answer)
        gaps = np.abs(actor - learner) / np.maximum(1.0, np.abs(learner))
        return Spread(float(gaps.mean()), float(np.quantile(gaps, QUANTILE)))


class SpreadCheck:
    """Bounds of the mean and of a quantile of the relative gap, for bf16."""

    def __init__(self) -> None:
        self._bounds = Spread(*SPREAD_FLOOR)
        self._fresh_rms = SPREAD_FLOOR[0]

    @property
    def tolerance(self) -> float:
        return self._bounds.mean

    def calibrate(self, expected: Scores, answers: Sequence[Scores]) -> float:
        spreads = [Spread.of(expected, answer) for answer in answers]
        fresh = Spread(max(spread.mean for spread in spreads), max(spread.quantile for spread in spreads))
        if not (fresh.mean <= SPREAD_CEILING[0] and fresh.quantile <= SPREAD_CEILING[1]):
            raise WeightSyncError(
                f"actors and learner loaded the same files and their log-probabilities differ by {fresh.mean:.2e} of "
                f"their size in the mean (at most {SPREAD_CEILING[0]:.0e} is rounding), {fresh.quantile:.2e} in the "
                f"{QUANTILE:.0%} quantile (at most {SPREAD_CEILING[1]:.0e}): {DIFFERENT}"
            )
        self._fresh_rms = max(rms_gap(expected, answer) for answer in answers)
        self._bounds = Spread(
            min(max(SPREAD_FLOOR[0], SPREAD_FACTOR * fresh.mean), SPREAD_CEILING[0]),
            min(max(SPREAD_FLOOR[1], SPREAD_FACTOR * fresh.quantile), SPREAD_CEILING[1]),
        )
        return max(largest_gap(expected, answer)[0] for answer in answers)

    def problem(self, expected: Scores, answer: Scores) -> str:
        spread, bounds = Spread.of(expected, answer), self._bounds
        if spread.mean <= bounds.mean and spread.quantile <= bounds.quantile:
            return ""
        return (
            f"log-probabilities differ from the learner's by {spread.mean:.2e} of their size in the mean, allowed are "
            f"{bounds.mean:.2e}, and by {spread.quantile:.2e} in the {QUANTILE:.0%} quantile, allowed are "
            f"{bounds.quantile:.2e}"
        )

    def distances(self, expected: Scores, previous: Scores, answer: Scores) -> tuple[float, float] | None:
        # Root mean squares: the answer is nearer to the previous scores if less than half of the movement is in it.
        # Independent rounding changes that share by its own size over the movement and the root of the tokens.
        movement = rms_gap(expected, previous) * np.sqrt(sum(row.size for row in expected))
        if movement <= MOVEMENT_FACTOR * self._fresh_rms:
            return None
        return rms_gap(answer, expected), rms_gap(answer, previous)


def probe_check(dtype: str, tolerance: float | None) -> ProbeCheck:
    """Return the check for a dtype.

    Args:
        dtype: "bf16" if the actors or the learner compute in it, else "fp32".
        tolerance: weight_sync.probe_tolerance, a bound of the largest gap in any dtype.
    """
    return SpreadCheck() if dtype == "bf16" and tolerance is None else MaximumCheck(tolerance)


def mean_gap(left: Scores, right: Scores) -> float:
    """Return the mean absolute difference, in nats."""
    return float(np.mean(np.abs(np.concatenate(left) - np.concatenate(right)), dtype=np.float64))


def rms_gap(left: Scores, right: Scores) -> float:
    """Return the root mean square of the difference, in nats."""
    return float(np.sqrt(np.mean(np.square(np.concatenate(left) - np.concatenate(right)), dtype=np.float64)))


def largest_gap(expected: Scores, answer: Scores) -> tuple[float, int, int]:
    """Return the largest absolute difference, its row and its token; NaN and missing numbers count as infinite."""
    if [row.shape for row in expected] != [row.shape for row in answer]:
        return np.inf, 0, 0
    largest = (-1.0, 0, 0)
    for row, (left, right) in enumerate(zip(expected, answer, strict=True)):
        if not left.size:  # a row of one token predicts nothing
            continue
        gaps = np.nan_to_num(np.abs(left - right), nan=np.inf)
        position = int(gaps.argmax())
        largest = max(largest, (float(gaps[position]), row, position + 1))
    return largest
