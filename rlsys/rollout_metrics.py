"""Figures of the groups that a training step consumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlsys.types import TrajectoryGroup


def rollout_metrics(groups: Sequence[TrajectoryGroup], version: int) -> Mapping[str, float]:
    """Names of the metrics registry. version: weight version of the learner before the step."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    judged = [t for t in trajectories if t.judged]
    lengths = [t.completion_length for t in trajectories]
    rewards = [[t.reward for t in group.trajectories] for group in groups]
    staleness = [version - group.oldest_version for group in groups]
    return {
        "rollout/reward": float(np.mean([t.reward for t in judged])) if judged else 0.0,
        "rollout/accuracy": float(np.mean([t.outcome == "ok" and t.reward > 0 for t in trajectories])),
        "rollout/no_answer_rate": float(np.mean([t.judged and not t.answered for t in trajectories])),
        "rollout/truncated_rate": float(np.mean([t.finish_reason == "length" for t in trajectories])),
        "rollout/completion_length": float(np.mean(lengths)),
        "rollout/completion_length_max": float(np.max(lengths)),
        "rollout/group_reward_std": float(np.mean([np.std(row) for row in rewards])),
        "rollout/zero_advantage_groups": float(np.mean([min(row) == max(row) for row in rewards])),
        "rollout/verifier_errors": float(len(trajectories) - len(judged)),
        "rollout/tokens": float(np.sum(lengths)),
        "rollout/staleness_mean": float(np.mean(staleness)),
        "rollout/staleness_max": float(np.max(staleness)),
    }
