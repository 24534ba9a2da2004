"""Scores of preference pairs under a reference policy, computed once for a stage and kept in the run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.data.rows import PairRows
from rlsys.errors import CheckpointError, NonFiniteLossError
from rlsys.files import read_json, write_json
from rlsys.interfaces import Learner

STEPS_IN_CALL = 3
"""Training steps whose pairs are scored in one call. A pass without gradients takes about a third of a training step,
and both have the deadline learner.timeout_s."""


class ReferenceScores:
    """Scores of all pairs of a file, [P, 2]: the chosen and the rejected side, in nats.

    Args:
        path: the file of the scores.
        key: JSON-able facts that decide the scores. Scores that were kept under another key are computed again.
    """

    def __init__(self, path: Path, pairs: PairRows, key: Mapping[str, Any]) -> None:
        self._path, self._pairs, self._key = path, pairs, {**key, "pairs": pairs.digest()}
        self.scores = self._read()

    @property
    def missing(self) -> bool:
        """Whether the scores are still to be computed."""
        return self.scores is None

    async def compute(self, learner: Learner, pairs_per_step: int, between: Callable[[], None]) -> None:
        """Score all pairs with a learner that holds the reference policy, and keep the scores.

        Args:
            between: called before every call of the learner; an error that it raises ends the scoring.
        Raises:
            NonFiniteLossError: a score is not finite.
        """
        size = STEPS_IN_CALL * pairs_per_step
        answers: list[tuple[float, float]] = []
        for first in range(0, len(self._pairs), size):
            between()
            numbers = range(first, min(first + size, len(self._pairs)))
            answers += await learner.score_pairs([self._pairs.row(number) for number in numbers])
        scores = np.array(answers, dtype=np.float64).reshape(len(self._pairs), 2)
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
            raise NonFiniteLossError(f"pair {row + 1} of the preference data has a score that is not finite")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"key": self._key, "scores": scores.tolist()})
        self.scores = scores

    def _read(self) -> NDArray[np.float64] | None:
        """Return the kept scores, or None if they are missing, damaged or have another key."""
        with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):
            record = read_json(self._path)
            scores = np.array(record["scores"], dtype=np.float64)
            if record["key"] == self._key and scores.shape == (len(self._pairs), 2):
                return scores
        return None
