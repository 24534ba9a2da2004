"""Overlong reward shaping: a penalty on completions that come close to the length limit.

The learner shapes rewards with it. Dynamic sampling and the metrics compare the shaped rewards, and must see the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.types import TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlongShaping:
    """The overlong shaping of a run; see `soft_overlong_penalty` for the numbers. A buffer of 0 shapes nothing."""

    max_tokens: int = 0
    buffer: int = 0
    factor: float = 0.0

    def apply(self, group: TrajectoryGroup) -> TrajectoryGroup:
        """Return the group with shaped rewards."""
        if not self.buffer:
            return group
        lengths = np.array([trajectory.completion_length for trajectory in group.trajectories], dtype=np.int64)
        penalties = soft_overlong_penalty(lengths, max_tokens=self.max_tokens, buffer=self.buffer, factor=self.factor)
        trajectories = (
            replace(trajectory, reward=trajectory.reward + float(penalty))
            for trajectory, penalty in zip(group.trajectories, penalties, strict=True)
        )
        return replace(group, trajectories=tuple(trajectories))

    def rewards_differ(self, group: TrajectoryGroup) -> bool:
        """Return whether two judged trajectories of a group have different shaped rewards."""
        return len({trajectory.reward for trajectory in self.apply(group).trajectories if trajectory.judged}) > 1


def soft_overlong_penalty(
    lengths: NDArray[np.integer[Any]], *, max_tokens: int, buffer: int, factor: float
) -> NDArray[np.float64]:
    """Return the reward adjustment of completions near the length limit.

    -factor * min( max( (|o| - (max_tokens - buffer)) / buffer, 0 ), 1 )

    Args:
        lengths: [G], tokens of every completion.
        max_tokens: length limit of a completion, `sampling.max_tokens`.
        buffer: number of last tokens over which the penalty grows from 0 to `factor`; in [1, max_tokens].
        factor: largest penalty, >= 0.

    Returns:
        [G] float64, <= 0; add it to the rewards.

    Raises:
        ValueError: buffer or factor is outside its range.

    Source: DAPO, arXiv:2503.14476, eq. 13.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(
            f"expected a buffer of 1 to {max_tokens} tokens (sampling.max_tokens), found {buffer}; "
            "change objective.policy.overlong_buffer"
        )
    if factor < 0.0:
        raise ValueError(f"expected a penalty >= 0, found {factor}; change objective.policy.overlong_penalty")
    return np.minimum(np.clip((max_tokens - buffer - lengths) / buffer, -1.0, 0.0) * factor, 0.0)
