"""The judgement of a completion as keys of a row, in one order and one form for terminal, pages and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from rlsys.types import FinishReason, Trajectory, TrajectoryGroup

Order = Literal["best", "worst"]
Item = TypeVar("Item")
ENDS: Mapping[FinishReason, str] = {
    "stop": "its end",
    "length": "the token limit",
    "turns": "its last turn",
    "abort": "an abort",
}
"""What ended a completion, for people."""


def by_reward(items: Iterable[Item], order: Order, reward: Callable[[Item], float | None]) -> list[Item]:
    """Return items with the best or worst first; those without a reward come last, equal ones keep their order."""
    sign = -1 if order == "best" else 1
    return sorted(items, key=lambda item: ((own := reward(item)) is None, sign * (own or 0.0)))


def reward_of(trajectory: Trajectory) -> float | None:
    """Return the reward of a trajectory; None without a verdict."""
    return float(trajectory.reward) if trajectory.judged else None


def group_rewards(group: TrajectoryGroup) -> list[float]:
    """Return the rewards of the judged trajectories of a group."""
    return [float(trajectory.reward) for trajectory in group.trajectories if trajectory.judged]


def group_facts(group: TrajectoryGroup) -> dict[str, Any]:
    """Return the keys about the group of a completion: its size, the judged ones, their mean reward or None."""
    rewards = group_rewards(group)
    mean = float(np.mean(rewards)) if rewards else None
    return {"group_size": len(group.trajectories), "group_judged": len(rewards), "group_reward": mean}


def judgement(trajectory: Trajectory) -> dict[str, Any]:
    """Return the keys about the judgement of a completion. `tokens` counts those that the policy chose."""
    return {
        "reward": reward_of(trajectory),
        "parts": {name: float(value) for name, value in trajectory.parts.items()},
        "outcome": trajectory.outcome,
        "correct": trajectory.correct,
        "answered": trajectory.answered,
        "finish_reason": trajectory.finish_reason,
        "tokens": trajectory.completion_length,
    }


def own_logprobs(trajectory: Trajectory) -> list[float | None]:
    """Return the log-probability of every token, None for tokens that the policy did not choose."""
    pairs = zip(trajectory.behavior_logprobs, trajectory.loss_mask, strict=True)
    return [round(float(logprob), 4) + 0.0 if own else None for logprob, own in pairs]


def mean_logprob(row: Mapping[str, Any]) -> float | None:
    """Return the mean log-probability of the tokens that the policy chose; None without any."""
    logprobs = [logprob for logprob in row["logprobs"] if logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else None


def judged_of(row: Mapping[str, Any]) -> str:
    """Return the size of the group of a completion, and how many of it are judged if not all are.

    A row from before the key `group_judged` does not say how many are.
    """
    size, judged = row["group_size"], row.get("group_judged", row["group_size"])
    return f"{size}" if judged == size else f"{judged} judged of {size}"


def heading(row: Mapping[str, Any]) -> str:
    """Return the judgement of a completion in a line."""
    parts = ["right" if row["correct"] else row["outcome"]]
    if row["reward"] is not None:
        mean = "" if row["group_reward"] is None else f" (mean of its {judged_of(row)}: {row['group_reward']:.3g})"
        parts.append(f"reward {row['reward']:g}{mean}")
        parts += [] if row["answered"] else ["no answer"]
    parts.append(f"{row['tokens']} tokens")
    parts += [] if row["finish_reason"] == "stop" else [f"ended by {ENDS[row['finish_reason']]}"]
    mean_of_tokens = mean_logprob(row)
    parts += [] if mean_of_tokens is None else [f"mean log-probability {mean_of_tokens:.3f}"]
    return ", ".join(parts)
