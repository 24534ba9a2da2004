"""Compute means with confidence intervals, and pass@k."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_Z = 1.959964  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_over_prompts(
    values: np.ndarray, seed: int = 0, resamples: int = 2000, groups: np.ndarray | None = None
) -> Estimate:
    """Return the mean of samples with a 95 % bootstrap interval over prompts.

    Samples of one prompt are not independent, so the bootstrap draws whole prompts. If all prompts are 0, or all are 1,
    every draw is equal and shows no uncertainty. Then the interval is Wilson's for n prompts: [0, z^2 / (n + z^2)] or
    [n / (n + z^2), 1].

    Args:
        values: [prompts, samples].
        seed: seed of the bootstrap.
        resamples: number of bootstrap draws.
        groups: [prompts], labels; prompts with the same label are not independent, and are drawn together.
    Source: Efron 1979, percentile bootstrap; Wilson 1927, score interval.
    """
    per_prompt = values.mean(axis=1)
    mean = float(per_prompt.mean())
    if mean in (0.0, 1.0):
        width = _width_without_variation(len(per_prompt) if groups is None else len(np.unique(groups)))
        return Estimate(mean, max(0.0, mean - width), min(1.0, mean + width))
    return _bootstrap(per_prompt, seed, resamples, groups)


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Return the mean of values that are not shares, such as lengths, with a 95 % bootstrap interval over prompts.

    Args:
        values: [prompts, samples].
        seed: seed of the bootstrap.
        resamples: number of bootstrap draws.
    """
    return _bootstrap(values.mean(axis=1), seed, resamples, None)


def mean_difference(
    first: np.ndarray, second: np.ndarray, seed: int = 0, resamples: int = 2000, groups: np.ndarray | None = None
) -> Estimate:
    """Return the mean of first - second with a 95 % bootstrap interval over the prompts.

    The bootstrap draws pairs, so the difficulty of a prompt cancels. If all differences are equal, the interval extends
    to both sides by the width of Wilson's interval, as in `mean_over_prompts`.

    Args:
        first: [prompts], in [0, 1].
        second: [prompts], in [0, 1], for the same prompts.
        seed: seed of the bootstrap.
        resamples: number of bootstrap draws.
        groups: as in `mean_over_prompts`.
    """
    differences = first.astype(float) - second.astype(float)
    if np.ptp(differences) == 0:
        count = len(differences) if groups is None else len(np.unique(groups))
        mean, width = float(differences[0]), _width_without_variation(count)
        return Estimate(mean, max(-1.0, mean - width), min(1.0, mean + width))
    return _bootstrap(differences, seed, resamples, groups)


def _bootstrap(values: np.ndarray, seed: int, resamples: int, groups: np.ndarray | None) -> Estimate:
    labels = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums, counts = np.bincount(labels, weights=values), np.bincount(labels)
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    low, high = np.quantile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def _width_without_variation(count: int) -> float:
    """Return the width of Wilson's interval for a share of 0, or of 1, of `count` prompts."""
    return _Z**2 / (count + _Z**2)


def pass_at_k(values: np.ndarray, k: int) -> np.ndarray:
    """Return, for each prompt, the probability that one of k samples drawn without replacement is correct.

    1 - C(n - c, k) / C(n, k) with c correct samples of n.

    Args:
        values: [prompts, samples], 1 for a correct sample and 0 otherwise.
        k: number of drawn samples, 1 to n.
    Returns:
        [prompts, 1].
    Raises:
        ValueError: k is out of range.
    Source: Chen et al., arXiv:2107.03374, eq. 1.
    """
    total = values.shape[1]
    if not 1 <= k <= total:
        raise ValueError(f"pass@k needs 1 <= k <= samples ({total}), found {k}")
    correct = values.sum(axis=1)
    return np.array([[1 - math.comb(total - int(c), k) / math.comb(total, k)] for c in correct])
