"""Advantages of sampled completions: how much better than expected each one was, or each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlsys.types import BoolArray

Float64Array = NDArray[np.float64]
GroupEstimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]

STD_EPSILON = 1e-6
WHITEN_EPSILON = 1e-8


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

    Source: GRPO, arXiv:2402.03300, sec. 4.1.2; Dr.GRPO, arXiv:2503.20783, sec. 3.2; RLOO, arXiv:2402.14740;
        REINFORCE++, arXiv:2501.03262.
    """
    if rewards.ndim != 1 or rewards.shape != valid.shape:
        raise ValueError(f"expected rewards and valid of one shape [G], found {rewards.shape} and {valid.shape}")
    kept = rewards[valid].astype(np.float64)
    _check_finite("rewards of a group", kept)
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


def token_returns(rewards: Float64Array, mask: BoolArray, gamma: float) -> Float64Array:
    """What every trained token leads to: G_t = r_t + gamma G_next, next being the next trained token.

    Tokens that are not trained are no steps: they discount nothing and their rewards are ignored.

    Args:
        rewards: [T], one reward a token; the verifier's stands on the last trained token.
        mask: [T], True on trained tokens.
        gamma: discount, in [0, 1].

    Returns:
        [T] float64, 0 where the mask is False.

    Raises:
        ValueError: shapes differ, the reward of a trained token is not finite, or gamma is outside [0, 1].

    Source: REINFORCE++, arXiv:2501.03262.
    """
    return gae(rewards, np.zeros(rewards.shape), mask, gamma=gamma, lam=1.0)[0]


def gae(
    rewards: Float64Array, values: Float64Array, mask: BoolArray, *, gamma: float, lam: float
) -> tuple[Float64Array, Float64Array]:
    """Generalised advantage estimation over the trained tokens of one trajectory.

    delta_t = r_t + gamma V_next - V_t;   A_t = delta_t + gamma lam A_next;   returns_t = A_t + V_t

    V and A after the end are 0. Tokens that are not trained are no actions of the policy: V_next and A_next pass them
    unchanged, and what stands at them is ignored.

    Args:
        rewards: [T], one reward a token; the verifier's stands on the last trained token.
        values: [T], V_t: what the critic expects before token t is chosen.
        mask: [T], True on trained tokens.
        gamma: discount, in [0, 1].
        lam: 1 gives the return minus the value, 0 the temporal difference; in [0, 1].

    Returns:
        Advantages and returns (the critic's targets), [T] float64 each, 0 where the mask is False.

    Raises:
        ValueError: shapes differ, a reward or value of a trained token is not finite, or gamma or lam is outside
            [0, 1].

    Source: Schulman et al., arXiv:1506.02438, eq. 16; the rule for tokens that are not trained is verl's.
    """
    if rewards.ndim != 1 or not rewards.shape == values.shape == mask.shape:
        shapes = f"{rewards.shape}, {values.shape} and {mask.shape}"
        raise ValueError(f"expected rewards, values and mask of one shape [T], found {shapes}")
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"expected gamma and lam in [0, 1], found {gamma} and {lam}")
    _check_finite("rewards of trained tokens", rewards[mask])
    _check_finite("values of trained tokens", values[mask])
    steps = list(zip(rewards[mask].tolist(), values[mask].tolist(), strict=True))
    found = np.zeros(len(steps))
    next_value = next_advantage = 0.0
    for place in reversed(range(len(steps))):
        reward, value = steps[place]
        next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_value = value
        found[place] = next_advantage
    advantages, returns = np.zeros((2, *rewards.shape))
    advantages[mask] = found
    returns[mask] = found + values[mask]
    return advantages, returns


def whiten(advantages: Sequence[Float64Array], masks: Sequence[BoolArray]) -> list[Float64Array]:
    """Mean 0 and standard deviation 1 over all trained tokens of a training step.

    (A - mean) / (std + 1e-8),   mean and std (ddof 0) over the entries of all rows where the mask is True

    Exactly 0 where all of these are equal: rounding in the mean must not become a signal that 1 / std blows up.

    Args:
        advantages: [T_i] of every row.
        masks: [T_i] of every row, True on trained tokens.

    Returns:
        [T_i] float64 of every row, 0 where the mask is False, whatever stands there.

    Raises:
        ValueError: as many masks as rows are needed, of the same shapes; or the advantage of a trained token is not
            finite.

    Source: REINFORCE++, arXiv:2501.03262.
    """
    if [row.shape for row in advantages] != [mask.shape for mask in masks]:
        raise ValueError(f"expected a mask of every row's shape, found {len(advantages)} rows, {len(masks)} masks")
    kept = np.concatenate([np.zeros(0), *(row[mask] for row, mask in zip(advantages, masks, strict=True))])
    _check_finite("advantages of trained tokens", kept)  # NaN is not below anything: it would pass for equal ones
    found = [np.zeros(row.shape) for row in advantages]
    if len(kept) and kept.min() < kept.max():
        mean, std = kept.mean(), kept.std() + WHITEN_EPSILON
        for whitened, row, mask in zip(found, advantages, masks, strict=True):
            whitened[mask] = (row[mask] - mean) / std
    return found


def _check_finite(what: str, values: Float64Array) -> None:
    bad = values[~np.isfinite(values)]
    if len(bad):
        raise ValueError(f"expected finite {what}, found {bad[0]} among {len(bad)} of {len(values)} that are not")
