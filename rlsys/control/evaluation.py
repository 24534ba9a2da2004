"""Held-out figures from trajectory groups: accuracy, pass@k, no-answer rate, with intervals."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np

from rlsys.control.budgets import verifier_limit
from rlsys.errors import TooManyFailuresError
from rlsys.interfaces import RolloutPool
from rlsys.stats import pass_at_k
from rlsys.types import Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup


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
