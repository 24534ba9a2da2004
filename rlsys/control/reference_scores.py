"""What a reference policy says of preference pairs: computed once for a stage, and kept in the run directory."""

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

# A pass without gradients takes about a third of the time of a training step, which has learner.timeout_s too.
STEPS_IN_CALL = 3


class ReferenceScores:
    """The scores of all pairs of a file, [P, 2]: of the chosen and the rejected side, in nats.

    Args:
        path: where they are kept.
        key: JSON-able facts that decide them. What was kept under others is computed again.
    """

    def __init__(self, path: Path, pairs: PairRows, key: Mapping[str, Any]) -> None:
        self._path, self._pairs, self._key = path, pairs, {**key, "pairs": pairs.digest()}
        self.scores = self._kept()

    @property
    def missing(self) -> bool:
        return self.scores is None

    async def compute(self, learner: Learner, pairs_per_step: int, between: Callable[[], None]) -> None:
        """Ask the learner, which holds the reference policy now, in calls of a bounded size, and keep the answers.

        Args:
            between: called before every call; what it raises ends the scoring.
        Raises:
            NonFiniteLossError: a score is not finite.
        """
        size = STEPS_IN_CALL * pairs_per_step
        found: list[tuple[float, float]] = []
        for first in range(0, len(self._pairs), size):
            between()
            numbers = range(first, min(first + size, len(self._pairs)))
            found += await learner.score_pairs([self._pairs.row(number) for number in numbers])
        scores = np.array(found, dtype=np.float64).reshape(len(self._pairs), 2)
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
            raise NonFiniteLossError(f"pair {row + 1} of the preference data has a score that is not finite")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"key": self._key, "scores": scores.tolist()})
        self.scores = scores

    def _kept(self) -> NDArray[np.float64] | None:
        with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):
            found = read_json(self._path)
            scores = np.array(found["scores"], dtype=np.float64)
            if found["key"] == self._key and scores.shape == (len(self._pairs), 2):
                return scores
        return None
