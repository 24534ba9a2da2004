"""Advantages of the completions of one prompt: how much better than its siblings each one was."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlsys.types import BoolArray

Float64Array = NDArray[np.float64]
GroupEstimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]

STD_EPSILON = 1e-6


def group_advantages(rewards: Float64Array, valid: BoolArray, *, estimator: GroupEstimator) -> Float64Array:
    """Advantages of the n valid completions of one prompt.

    mean = (1/n) sum_i R_i;   std = sqrt( sum_i (R_i - mean)^2 / (n - 1) )

    grpo:                   A_i = (R_i - mean) / (std + 1e-6)
    dr_grpo:                A_i = R_i - mean
    rloo:                   A_i = R_i - sum_{j != i} R_j / (n - 1) = n / (n - 1) (R_i - mean)
    reinforce_pp:           A_i = R_i
    reinforce_pp_baseline:  A_i = R_i - mean

    The last two are not finished: `whiten` centres and scales them over the tokens of a whole training step.

    All but reinforce_pp sum to 0 over a group. They are exactly 0 where there is nothing to compare: all valid
    rewards are equal (rounding in the mean must not become a signal that 1 / std blows up), or fewer than
    two are valid. Entries that are not valid get 0 and touch nothing else; even a NaN there is ignored.

    Args:
        rewards: [G], one reward a completion.
        valid: [G], True where the verifier returned a verdict (outcome "ok" or "wrong").
        estimator: one of the above. grpo divides by the sample standard deviation (n - 1 in the denominator, as
            verl and trl do).

    Returns:
        [G] float64.

    Raises:
        ValueError: shapes differ, a valid reward is not finite, or an unknown estimator.

    Source: GRPO, arXiv:2402.03300, sec. 4.1.2; Dr.GRPO, arXiv:2503.20783, sec. 3.2; RLOO, arXiv:2402.14740, eq. 5;
        REINFORCE++, arXiv:2501.03262.
    """
    if rewards.ndim != 1 or rewards.shape != valid.shape:
        raise ValueError(f"expected rewards and valid of one shape [G], found {rewards.shape} and {valid.shape}")
    kept = rewards[valid].astype(np.float64)
    if not np.isfinite(kept).all():
        raise ValueError(f"expected finite rewards from the task's verifier, found {kept.tolist()}")
    advantages = np.zeros(rewards.shape, dtype=np.float64)
    advantages[valid] = kept if estimator == "reinforce_pp" else _compared(kept, estimator)
    return advantages


def _compared(rewards: Float64Array, estimator: GroupEstimator) -> Float64Array:
    """Every reward against the rewards of its group."""
    count = len(rewards)
    level = count < 2 or rewards.min() == rewards.max()
    centred = np.zeros(count) if level else rewards - rewards.mean()
    match estimator:
        case "grpo":
            return centred if level else centred / (rewards.std(ddof=1) + STD_EPSILON)
        case "dr_grpo" | "reinforce_pp_baseline":
            return centred
        case "rloo":
            return centred * (count / max(count - 1, 1))
        case _:
            raise ValueError(f"unknown estimator {estimator!r} of group advantages")
