"""Held-out figures from trajectory groups: accuracy, pass@k, no-answer rate, with intervals."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.errors import TooManyFailuresError
from rlsys.interfaces import RolloutPool
from rlsys.types import Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


async def sample_groups(
    pool: RolloutPool, prompts: Sequence[Prompt], settings: SamplingSettings
) -> list[TrajectoryGroup]:
    """Groups of all prompts, dealt over the actors, in the order of the prompts.

    Raises:
        TooManyFailuresError: a rollout failed; a figure over the rest would not be the one asked for.
    """
    count = pool.count
    parts = await asyncio.gather(*(pool.generate(actor, prompts[actor::count], settings) for actor in range(count)))
    found: list[TrajectoryGroup | RolloutFailure] = [parts[i % count][i // count] for i in range(len(prompts))]
    failures = [outcome for outcome in found if isinstance(outcome, RolloutFailure)]
    if failures:
        raise TooManyFailuresError(
            f"{len(failures)} of {len(prompts)} evaluation rollouts failed; the first: {failures[0].reason}"
        )
    return [outcome for outcome in found if isinstance(outcome, TrajectoryGroup)]


def solved(groups: Sequence[TrajectoryGroup]) -> np.ndarray:
    """[prompts, samples] bool: which trajectories are right."""
    rows = [[t.outcome == "ok" and t.reward > 0 for t in group.trajectories] for group in groups]
    return np.array(rows, dtype=bool)


def answered(groups: Sequence[TrajectoryGroup]) -> np.ndarray:
    """[prompts, samples] bool: which trajectories hold a valid answer."""
    return np.array([[t.answered for t in group.trajectories] for group in groups], dtype=bool)


def mean_over_prompts(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of [prompts, samples] with a bootstrap interval over prompts.

    Samples of one prompt are not independent, so whole prompts are drawn. Source: Efron, percentile bootstrap.
    """
    per_prompt = values.mean(axis=1)
    draws = np.random.default_rng(seed).integers(0, len(per_prompt), size=(resamples, len(per_prompt)))
    low, high = np.quantile(per_prompt[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(float(per_prompt.mean()), float(low), float(high))


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
            found[f"held_out/{name}_no_answer_rate"] = 1 - float(answered(groups).mean())
    if sampled:
        values = solved(sampled)
        found["held_out/pass_at_k"] = float(pass_at_k(values, values.shape[1]).mean())
    if measured := sampled or greedy:
        lengths = [t.completion_length for group in measured for t in group.trajectories]
        found["held_out/completion_length"] = float(np.mean(lengths))
    return found
