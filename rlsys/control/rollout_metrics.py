"""Metrics of the groups of a training step, and of the engines over the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlsys.config.rewards import ENVIRONMENT, TASK
from rlsys.interfaces import EngineStats
from rlsys.overlong import OverlongShaping
from rlsys.run.judgements import group_rewards
from rlsys.run.metrics import REWARDS
from rlsys.search.stats import prefix_hit_rate
from rlsys.types import Trajectory, TrajectoryGroup

UNSHAPED = OverlongShaping()
_Z = 1.96  # 97.5 % quantile of the standard normal distribution
# Metrics of a tree that are summed over the trees of a step, under the same names.
SUMMED = (
    "simulations",
    "calls",
    "tokens",
    "scored",
    "correct",
    "defects",
    "duplicates",
    "backtracks",
    "verifier_errors",
    "replies",
    "environment_errors",
    "values",
    "value_errors",
)


def rollout_metrics(
    groups: Sequence[TrajectoryGroup], version: int, unused_tokens: int = 0, shaping: OverlongShaping = UNSHAPED
) -> Mapping[str, float]:
    """Return the metrics of a step by names of rlsys.run.metrics.

    Some metrics are for sampled groups only, and some for searched groups only. They are left out if there is no such
    group.

    Args:
        version: the weight version of the learner before the step.
        unused_tokens: tokens of replaced and failed rollouts, which are not in `groups`.
        shaping: decides which groups have equal rewards for the learner.
    """
    sampled = [group for group in groups if not group.searched]
    searched = [group for group in groups if group.searched]
    return {
        **(_sampled_metrics(sampled, shaping) if sampled else {}),
        **_staleness(groups, version),
        **(_searched_metrics(searched) if searched else {}),
        "rollout/generated_tokens": float(unused_tokens + sum(map(generated_tokens, groups))),
    }


def generated_tokens(group: TrajectoryGroup) -> int:
    """Return the number of tokens generated for a group, including cut-off and merged nodes of a tree."""
    if group.searched:
        return int(group.metrics["tokens"])
    return sum(trajectory.completion_length for trajectory in group.trajectories)


def engine_metrics(stats: Sequence[EngineStats]) -> Mapping[str, float]:
    """Return the metrics of all engines over the same time, by names of rlsys.run.metrics.

    Without prompt tokens there is no hit rate of the prefix cache. The token rate adds up the engines of the policy,
    each over the seconds in which it worked, so that waiting for the learner or the verifiers does not lower it.
    """
    metrics = {
        "rollout/tokens_per_s": sum(
            engine.generated_tokens / engine.busy_s for engine in stats if engine.model == "policy" and engine.busy_s
        )
    }
    if (hits := prefix_hit_rate(stats)) is not None:
        metrics["rollout/prefix_cache_hits"] = hits
    for role in dict.fromkeys(engine.model for engine in stats):
        idle = [engine.idle_share or 0.0 for engine in stats if engine.model == role]
        metrics[f"rollout/idle_{role}"] = float(np.mean(idle))
    return metrics


def _sampled_metrics(groups: Sequence[TrajectoryGroup], shaping: OverlongShaping) -> Mapping[str, float]:
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    judged = [t for t in trajectories if t.judged]
    lengths = [t.completion_length for t in trajectories]
    rewards = [group_rewards(group) for group in groups]
    reward = float(np.mean([t.reward for t in judged])) if judged else 0.0
    margin = _margin([float(np.mean(row)) for row in rewards if row])
    return {
        "rollout/reward": reward,
        "rollout/reward_low": reward - margin,
        "rollout/reward_high": reward + margin,
        "rollout/accuracy": float(np.mean([t.correct for t in trajectories])),
        "rollout/no_answer_rate": float(np.mean([t.judged and not t.answered for t in trajectories])),
        "rollout/truncated_rate": float(np.mean([t.truncated for t in trajectories])),
        "rollout/completion_length": float(np.mean(lengths)),
        "rollout/completion_length_max": float(np.max(lengths)),
        "rollout/group_reward_std": float(np.mean([np.std(row) if row else 0.0 for row in rewards])),
        "rollout/zero_advantage_groups": float(np.mean([not shaping.rewards_differ(group) for group in groups])),
        "rollout/verifier_errors": float(len(trajectories) - len(judged)),
        "rollout/tokens": float(np.sum(lengths)),
        **_reward_parts(judged),
        **_episode_metrics(groups),
    }


def _episode_metrics(groups: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
    """Return the metrics of episodes with an environment; none without one."""
    pairs = [(group.prompt, t) for group in groups for t in group.trajectories if t.turns or t.environment_failed]
    if not pairs:
        return {}
    total = sum(len(t.token_ids) - len(prompt.token_ids) for prompt, t in pairs)
    own = sum(t.completion_length for _, t in pairs)
    return {
        "rollout/turns": float(np.mean([t.turns for _, t in pairs])),
        "rollout/out_of_turns_rate": float(np.mean([t.finish_reason == "turns" for _, t in pairs])),
        "rollout/environment_share": (total - own) / total if total else 0.0,
        "rollout/environment_errors": float(sum(t.environment_failed for _, t in pairs)),
    }


def _reward_parts(judged: Sequence[Trajectory]) -> Mapping[str, float]:
    """Return the mean of every part of the rewards, over the trajectories that have it.

    An episode without a reward of its environment has 0 of it, if others have one.
    """
    parts: dict[str, list[float]] = {}
    rewarded = any(ENVIRONMENT in trajectory.parts for trajectory in judged)
    for trajectory in judged:
        own = trajectory.parts
        if rewarded and ENVIRONMENT not in own:
            own = {**(own or {TASK: trajectory.reward}), ENVIRONMENT: 0.0}
        for name, value in own.items():
            parts.setdefault(f"{REWARDS}{name}", []).append(value)
    return {name: float(np.mean(values)) for name, values in parts.items()}


def _margin(means: Sequence[float]) -> float:
    """Return half the 95 % interval of the mean of groups, by the normal distribution; 0 for a single group."""
    return _Z * float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else 0.0


def _staleness(groups: Sequence[TrajectoryGroup], version: int) -> Mapping[str, float]:
    """Return the staleness metrics of all groups. A tree that another model grew has staleness 0."""
    oldest = [group.oldest_version for group in groups]
    staleness = [0 if group_version is None else version - group_version for group_version in oldest]
    return {
        "rollout/staleness_mean": float(np.mean(staleness)),
        "rollout/staleness_max": float(np.max(staleness)),
    }


def _searched_metrics(groups: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
    sums = {name: float(sum(group.metrics[name] for group in groups)) for name in (*SUMMED, "solved", "reward_sum")}
    trained = sum(_trained_tokens(group) for group in groups)
    return {
        "search/trees": float(len(groups)),
        "search/solved": sums["solved"] / len(groups),
        "search/reward": sums["reward_sum"] / sums["scored"] if sums["scored"] else 0.0,
        **{f"search/{name}": sums[name] for name in SUMMED},
        "search/trained_share": trained / sums["tokens"] if sums["tokens"] else 0.0,
        "search/pairs": float(sum(len(group.pairs) for group in groups)),
        "search/step_preferences": float(sum(len(group.step_preferences) for group in groups)),
        "search/demonstrations": float(sum(len(group.demonstrations) for group in groups)),
    }


def _trained_tokens(group: TrajectoryGroup) -> int:
    """Return the number of trained tokens in judged trajectories. A node that they share counts once."""
    nodes = {
        step.node: int(trajectory.loss_mask[step.start : step.stop].sum())
        for trajectory in group.trajectories
        if trajectory.judged
        for step in trajectory.steps
    }
    return sum(nodes.values())
