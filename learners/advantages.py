"""Advantages of the completions of one prompt: how much better than its siblings each one was."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlsys.types import BoolArray

Float64Array = NDArray[np.float64]

STD_EPSILON = 1e-6


def group_advantages(rewards: Float64Array, valid: BoolArray, *, use_std: bool) -> Float64Array:
    """Group-relative advantages.

    mean = (1/n) sum_i R_i;   std = sqrt( sum_i (R_i - mean)^2 / (n - 1) ),  i over the n valid entries
    A_i  = (R_i - mean) / (std + 1e-6)      use_std (GRPO)
    A_i  = R_i - mean                       otherwise (Dr.GRPO; times n / (n - 1) it is RLOO)

    The advantages of a group sum to 0. They are exactly 0 where there is nothing to compare: all valid
    rewards are equal (rounding in the mean must not become a signal that 1 / std blows up), or fewer than
    two are valid. Entries that are not valid get 0 and touch nothing else; even a NaN there is ignored.

    Args:
        rewards: [G], one reward a completion.
        valid: [G], True where the verifier returned a verdict (outcome "ok" or "wrong").
        use_std: divide by the sample standard deviation (n - 1 in the denominator, as verl and trl do).

    Returns:
        [G] float64.

    Raises:
        ValueError: shapes differ, or a valid reward is not finite.

    Source: GRPO, arXiv:2402.03300, sec. 4.1.2; Dr.GRPO, arXiv:2503.20783, sec. 3.2.
    """
    if rewards.ndim != 1 or rewards.shape != valid.shape:
        raise ValueError(f"expected rewards and valid of one shape [G], found {rewards.shape} and {valid.shape}")
    advantages = np.zeros(rewards.shape, dtype=np.float64)
    kept = rewards[valid].astype(np.float64)
    if not np.isfinite(kept).all():
        raise ValueError(f"expected finite rewards from the task's verifier, found {kept.tolist()}")
    if len(kept) < 2 or kept.min() == kept.max():
        return advantages
    centred = kept - kept.mean()
    advantages[valid] = centred / (kept.std(ddof=1) + STD_EPSILON) if use_std else centred
    return advantages
