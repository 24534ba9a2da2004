"""Advantages of sampled completions and of their tokens: rewards relative to a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from learners.plugins import custom_advantages
from rlsys.types import BoolArray

Float64Array = NDArray[np.float64]
GroupEstimator = str
"""One of the names below, or that of a function; see `learners.plugins.custom_advantages`."""

STD_EPSILON = 1e-6
WHITEN_EPSILON = 1e-8


def group_advantages(rewards: Float64Array, valid: BoolArray, *, estimator: GroupEstimator) -> Float64Array:
    """Compute the advantages of the n valid completions of one prompt.

    mean = (1/n) sum_i R_i;   std = sqrt( sum_i (R_i - mean)^2 / (n - 1) )

    grpo:                   A_i = (R_i - mean) / (std + 1e-6)
    dr_grpo:                A_i = R_i - mean
    rloo:                   A_i = R_i - sum_{j != i} R_j / (n - 1) = n / (n - 1) (R_i - mean)
    reinforce_pp:           A_i = R_i
    reinforce_pp_baseline:  A_i = R_i - mean

    The last two are not final: `whiten` then centres and scales them over the tokens of a whole training step.

    Except with reinforce_pp, the advantages of a group sum to 0. They are exactly 0 if all valid rewards are equal or
    fewer than two are valid, so that rounding in the mean is never amplified by 1 / std. Invalid entries get 0 and have
    no effect on the others, even if they are NaN.

    Args:
        rewards: [G], one reward per completion.
        valid: [G], True where the verifier returned a verdict (outcome "ok" or "wrong").
        estimator: one of the above. grpo divides by the sample standard deviation, with n - 1 in the denominator as
            in verl and trl.

    Returns:
        [G] float64.

    Raises:
        ValueError: shapes differ, a valid reward is not finite, or an unknown estimator.

    Source: GRPO, arXiv:2402.03300, sec. 4.1.2; Dr.GRPO, arXiv:2503.20783, sec. 3.2; RLOO, arXiv:2402.14740;
        REINFORCE++, arXiv:2501.03262.
    """
    if rewards.ndim != 1 or rewards.shape != valid.shape:
        raise ValueError(f"expected rewards and valid of one shape [G], found {rewards.shape} and {valid.shape}")
    valid_rewards = rewards[valid].astype(np.float64)
    _check_finite("rewards of a group", valid_rewards)
    advantages = np.zeros(rewards.shape, dtype=np.float64)
    advantages[valid] = valid_rewards if estimator == "reinforce_pp" else _relative(valid_rewards, estimator)
    return advantages


def _relative(rewards: Float64Array, estimator: GroupEstimator) -> Float64Array:
    """Return every reward relative to the rewards of its group, by the formula of the estimator."""
    count = len(rewards)
    equal = count < 2 or rewards.min() == rewards.max()
    centred = np.zeros(count) if equal else rewards - rewards.mean()
    match estimator:
        case "grpo":
            return centred if equal else centred / (rewards.std(ddof=1) + STD_EPSILON)
        case "dr_grpo" | "reinforce_pp_baseline":
            return centred
        case "rloo":
            return centred * (count / max(count - 1, 1))
        case _ if ":" in estimator:
            return custom_advantages(rewards, estimator)
        case _:
            raise ValueError(f"unknown estimator {estimator!r} of group advantages")


def token_returns(rewards: Float64Array, mask: BoolArray, gamma: float) -> Float64Array:
    """Compute the discounted return of every trained token: G_t = r_t + gamma G_next.

    `next` is the next trained token. Untrained tokens are not steps: they do not discount, and their rewards are
    ignored.

    Args:
        rewards: [T], one reward per token; the verifier's reward is on the last trained token.
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
    """Compute generalised advantage estimates of the trained tokens of one trajectory.

    delta_t = r_t + gamma V_next - V_t;   A_t = delta_t + gamma lam A_next;   returns_t = A_t + V_t

    V and A after the end are 0. Untrained tokens are not actions of the policy: V_next and A_next pass over them, and
    their rewards and values are ignored.

    Args:
        rewards: [T], one reward per token; the verifier's reward is on the last trained token.
        values: [T], V_t, the critic's estimate of the return before token t is chosen.
        mask: [T], True on trained tokens.
        gamma: discount, in [0, 1].
        lam: in [0, 1]; 1 gives the return minus the value, 0 the temporal difference.

    Returns:
        Advantages and returns (the critic's targets), [T] float64 each, 0 where the mask is False.

    Raises:
        ValueError: shapes differ, a reward or value of a trained token is not finite, or gamma or lam is outside
            [0, 1].

    Source: Schulman et al., arXiv:1506.02438, eq. 16; the rule for untrained tokens is that of verl.
    """
    if rewards.ndim != 1 or not rewards.shape == values.shape == mask.shape:
        shapes = f"{rewards.shape}, {values.shape} and {mask.shape}"
        raise ValueError(f"expected rewards, values and mask of one shape [T], found {shapes}")
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"expected gamma and lam in [0, 1], found {gamma} and {lam}")
    _check_finite("rewards of trained tokens", rewards[mask])
    _check_finite("values of trained tokens", values[mask])
    steps = list(zip(rewards[mask].tolist(), values[mask].tolist(), strict=True))
    step_advantages = np.zeros(len(steps))
    next_value = next_advantage = 0.0
    for place in reversed(range(len(steps))):
        reward, value = steps[place]
        next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_value = value
        step_advantages[place] = next_advantage
    advantages, returns = np.zeros((2, *rewards.shape))
    advantages[mask] = step_advantages
    returns[mask] = step_advantages + values[mask]
    return advantages, returns


def whiten(advantages: Sequence[Float64Array], masks: Sequence[BoolArray]) -> list[Float64Array]:
    """Scale advantages to mean 0 and standard deviation 1 over all trained tokens of a training step.

    (A - mean) / (std + 1e-8),   mean and std (ddof 0) over the entries of all samples where the mask is True

    The result is exactly 0 if all these entries are equal, so that rounding in the mean is never amplified by 1 / std.

    Args:
        advantages: [T_i] per sample.
        masks: [T_i] per sample, True on trained tokens.

    Returns:
        [T_i] float64 per sample, 0 where the mask is False, even if the advantage there is NaN.

    Raises:
        ValueError: the masks differ from the advantages in number or shape, or the advantage of a trained token is
            not finite.

    Source: REINFORCE++, arXiv:2501.03262.
    """
    if [each.shape for each in advantages] != [mask.shape for mask in masks]:
        raise ValueError(
            f"expected a mask of every sample's shape, found {len(advantages)} samples, {len(masks)} masks"
        )
    trained = np.concatenate([np.zeros(0), *(each[mask] for each, mask in zip(advantages, masks, strict=True))])
    _check_finite(
        "advantages of trained tokens", trained
    )  # with NaN, the comparison below would treat all advantages as equal
    whitened = [np.zeros(each.shape) for each in advantages]
    if len(trained) and trained.min() < trained.max():
        mean, std = trained.mean(), trained.std() + WHITEN_EPSILON
        for output, each, mask in zip(whitened, advantages, masks, strict=True):
            output[mask] = (each[mask] - mean) / std
    return whitened


def _check_finite(name: str, values: Float64Array) -> None:
    bad = values[~np.isfinite(values)]
    if len(bad):
        raise ValueError(f"expected finite {name}, found {bad[0]} among {len(bad)} of {len(values)} that are not")
