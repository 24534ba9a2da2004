"""Held-out evaluation: samples greedy and random completions, and computes their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rlsys.config.schema import Config
from rlsys.control.budgets import verifier_limit
from rlsys.control.dispatch import sample
from rlsys.errors import TooManyFailuresError
from rlsys.interfaces import RolloutPool
from rlsys.stats import mean_over_prompts, pass_at_k
from rlsys.types import Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup


async def sample_groups(
    pool: RolloutPool, prompts: Sequence[Prompt], settings: SamplingSettings, max_verifier_failures: float
) -> list[TrajectoryGroup]:
    """Return the groups of all prompts, in order.

    Raises:
        TooManyFailuresError: a rollout failed, or more than a share of `max_verifier_failures` of the verifications.
            The accuracy of the other groups would not be comparable.
    """
    rollouts = await sample(pool, prompts, settings)
    failures = [rollout for rollout in rollouts if isinstance(rollout, RolloutFailure)]
    if failures:
        raise TooManyFailuresError(
            f"{len(failures)} of {len(prompts)} evaluation rollouts failed; the first: {failures[0].reason}"
        )
    groups = [rollout for rollout in rollouts if isinstance(rollout, TrajectoryGroup)]
    verifier_limit(max_verifier_failures).add_verdicts(groups)
    return groups


def mode_settings(config: Config) -> dict[str, SamplingSettings]:
    """Return the settings of the parts that the section `evaluation` asks for: "greedy", "sampled", or both.

    Sampled completions are drawn at temperature 1.
    """
    greedy = SamplingSettings(
        samples=1, temperature=0.0, top_p=1.0, max_tokens=config.sampling.max_tokens, seed=config.run.seed
    )
    sampled = replace(greedy, samples=config.evaluation.samples, temperature=1.0)
    return ({"greedy": greedy} if config.evaluation.greedy else {}) | ({"sampled": sampled} if sampled.samples else {})


async def evaluate_held_out(
    pool: RolloutPool, prompts: Sequence[Prompt], config: Config
) -> tuple[list[TrajectoryGroup], list[TrajectoryGroup]]:
    """Return the greedy groups and the sampled groups of held-out prompts, as the section `evaluation` asks for.

    The list of a part that is not asked for is empty.

    Raises:
        TooManyFailuresError: see `sample_groups`.
    """
    settings, limit = mode_settings(config), config.train.max_verifier_failures
    groups = {mode: await sample_groups(pool, prompts, each, limit) for mode, each in settings.items()}
    return groups.get("greedy", []), groups.get("sampled", [])


def solved(groups: Sequence[TrajectoryGroup]) -> np.ndarray:
    """Return the mask of correct trajectories, [prompts, samples] bool."""
    rows = [[t.correct for t in group.trajectories] for group in groups]
    return np.array(rows, dtype=bool)


def unanswered(groups: Sequence[TrajectoryGroup]) -> np.ndarray:
    """Return the mask of trajectories in which the verifier finds no valid answer, [prompts, samples] bool."""
    return np.array([[t.judged and not t.answered for t in group.trajectories] for group in groups], dtype=bool)


def error_rate(groups: Sequence[TrajectoryGroup]) -> float:
    """Return the share of the trajectories whose verification raised or ran out of time."""
    return float(np.mean([not t.judged for group in groups for t in group.trajectories]))


def held_out_metrics(greedy: Sequence[TrajectoryGroup], sampled: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
    """Return the metrics of the parts that were measured, by names of rlsys.run.metrics."""
    metrics: dict[str, float] = {}
    for name, groups in (("greedy", greedy), ("sampled", sampled)):
        if groups:
            accuracy = mean_over_prompts(solved(groups))
            metrics[f"held_out/{name}_accuracy"] = float(solved(groups).mean())
            metrics |= {f"held_out/{name}_accuracy_low": accuracy.low, f"held_out/{name}_accuracy_high": accuracy.high}
            metrics[f"held_out/{name}_no_answer_rate"] = float(unanswered(groups).mean())
            if judged := [t.reward for group in groups for t in group.trajectories if t.judged]:
                metrics[f"held_out/{name}_reward"] = float(np.mean(judged))
    if sampled:
        values = solved(sampled)
        metrics["held_out/pass_at_k"] = float(pass_at_k(values, values.shape[1]).mean())
    if measured := sampled or greedy:
        metrics["held_out/verifier_error_rate"] = error_rate([*greedy, *sampled])
        lengths = [t.completion_length for group in measured for t in group.trajectories]
        metrics["held_out/completion_length"] = float(np.mean(lengths))
    return metrics
