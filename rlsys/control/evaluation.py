"""Held-out figures from trajectory groups: accuracy, pass@k, no-answer rate, with intervals."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.control.budgets import verifier_limit
from rlsys.errors import TooManyFailuresError
from rlsys.interfaces import RolloutPool
from rlsys.types import Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup

_Z = 1.959964  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


async def sample_groups(
    pool: RolloutPool, prompts: Sequence[Prompt], settings: SamplingSettings, max_verifier_failures: float
) -> list[TrajectoryGroup]:
    """Groups of all prompts, dealt over the actors, in the order of the prompts.

    Raises:
        TooManyFailuresError: a rollout failed, or more than a share of `max_verifier_failures` of the
            verifications; a figure over the rest would not be the one asked for.
    """
    count = pool.count
    parts = await asyncio.gather(*(pool.generate(actor, prompts[actor::count], settings) for actor in range(count)))
    found: list[TrajectoryGroup | RolloutFailure] = [parts[i % count][i // count] for i in range(len(prompts))]
    failures = [outcome for outcome in found if isinstance(outcome, RolloutFailure)]
    if failures:
        raise TooManyFailuresError(
            f"{len(failures)} of {len(prompts)} evaluation rollouts failed; the first: {failures[0].reason}"
        )
    groups = [outcome for outcome in found if isinstance(outcome, TrajectoryGroup)]
    verifier_limit(max_verifier_failures).add_verdicts(groups)
    return groups


def solved(groups: Sequence[TrajectoryGroup]) -> np.ndarray:
    """[prompts, samples] bool: which trajectories are right."""
    rows = [[t.outcome == "ok" and t.reward > 0 for t in group.trajectories] for group in groups]
    return np.array(rows, dtype=bool)


def unanswered(groups: Sequence[TrajectoryGroup]) -> np.ndarray:
    """[prompts, samples] bool: which trajectories hold no valid answer, as the verifier found."""
    return np.array([[t.judged and not t.answered for t in group.trajectories] for group in groups], dtype=bool)


def error_rate(groups: Sequence[TrajectoryGroup]) -> float:
    """Share of the trajectories whose verification raised or ran out of time."""
    return float(np.mean([not t.judged for group in groups for t in group.trajectories]))


def mean_over_prompts(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of [prompts, samples] with a 95 % interval over prompts.

    Samples of one prompt are not independent, so whole prompts are drawn. Where all prompts are 0, or all 1,
    every draw is the same and says nothing of the uncertainty: there the interval is Wilson's for n prompts,
    [0, z^2 / (n + z^2)] or [n / (n + z^2), 1]. Source: Efron, percentile bootstrap; Wilson 1927, score interval.
    """
    per_prompt = values.mean(axis=1)
    mean = float(per_prompt.mean())
    if mean in (0.0, 1.0):
        width = _width_without_variation(len(per_prompt))
        return Estimate(mean, max(0.0, mean - width), min(1.0, mean + width))
    return _bootstrap(per_prompt, seed, resamples)


def mean_difference(first: np.ndarray, second: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of first - second, both [prompts] and in [0, 1], with a 95 % interval over the same prompts.

    Pairs are drawn, so what both find hard cancels. Where all differences are equal the interval is as wide as the
    one that `mean_over_prompts` gives there, to both sides.
    """
    differences = first.astype(float) - second.astype(float)
    if np.ptp(differences) == 0:
        mean, width = float(differences[0]), _width_without_variation(len(differences))
        return Estimate(mean, max(-1.0, mean - width), min(1.0, mean + width))
    return _bootstrap(differences, seed, resamples)


def _bootstrap(values: np.ndarray, seed: int, resamples: int) -> Estimate:
    draws = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def _width_without_variation(count: int) -> float:
    """Of Wilson's interval for a share of 0, or of 1, among `count`."""
    return _Z**2 / (count + _Z**2)


def pass_at_k(values: np.ndarray, k: int) -> np.ndarray:
    """[prompts, 1] chance that one of k samples drawn without replacement is right.

    1 - C(n - c, k) / C(n, k) with c right ones of n. Source: Chen et al., arXiv:2107.03374, eq. 1.
    """
    total = values.shape[1]
    if not 1 <= k <= total:
        raise ValueError(f"pass@k needs 1 <= k <= samples ({total}), found {k}")
    right = values.sum(axis=1)
    return np.array([[1 - math.comb(total - int(c), k) / math.comb(total, k)] for c in right])


def held_out_metrics(greedy: Sequence[TrajectoryGroup], sampled: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
    """Names of the metrics registry; only those of the parts that were measured."""
    found: dict[str, float] = {}
    for name, groups in (("greedy", greedy), ("sampled", sampled)):
        if groups:
            found[f"held_out/{name}_accuracy"] = float(solved(groups).mean())
            found[f"held_out/{name}_no_answer_rate"] = float(unanswered(groups).mean())
    if sampled:
        values = solved(sampled)
        found["held_out/pass_at_k"] = float(pass_at_k(values, values.shape[1]).mean())
    if measured := sampled or greedy:
        found["held_out/verifier_error_rate"] = error_rate([*greedy, *sampled])
        lengths = [t.completion_length for group in measured for t in group.trajectories]
        found["held_out/completion_length"] = float(np.mean(lengths))
    return found
