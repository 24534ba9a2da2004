"""Dynamic sampling: groups that teach nothing are replaced, in so many rounds at most, and their cost is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlsys.config.objective import ObjectiveConfig, PolicyConfig
from rlsys.control.budgets import FailureLimit
from rlsys.control.rollout_metrics import generated_tokens
from rlsys.overlong import soft_overlong_penalty
from rlsys.types import RolloutFailure, TrajectoryGroup


def has_signal(group: TrajectoryGroup, objective: ObjectiveConfig, max_tokens: int) -> bool:
    """Whether a group holds anything that sets one of its chains above another, for a term that the objective has.

    The policy term: two judged rewards differ, where rewards are shaped (objective.policy.overlong_buffer) the shaped
    ones. The terms preference and sft: the group brings what they are made of, pairs, step preferences or
    demonstrations, whichever objective.preference and objective.sft take from the step's own trees.

    The rule is about rewards whatever the estimator does with them: reinforce_pp and gae would train on equal rewards
    too, by what the step or the critic makes of them; the term kl and the critic train on any group and are no signal.
    A tree whose rewards differ counts although its estimator may compare none of them, as where all that is right
    followed a hint. Where there is no policy term no sampled group could ever be better than another, so all pass.

    Args:
        max_tokens: sampling.max_tokens, for the shaping.

    Source: DAPO, arXiv:2503.14476, sec. 3.2, which asks for right and wrong answers, before any shaping.
    """
    policy, preference, sft = objective.policy, objective.preference, objective.sft
    if not policy.used and not group.searched:
        return True
    if policy.used and _rewards_differ(group, policy, max_tokens):
        return True
    own_pairs = group.pairs if preference.pairs == "chains" else group.step_preferences
    paired = preference.used or (sft.used and sft.source == "chosen")
    if paired and preference.source == "search" and own_pairs:
        return True
    return sft.used and sft.source == "trees" and bool(group.demonstrations)


def _rewards_differ(group: TrajectoryGroup, policy: PolicyConfig, max_tokens: int) -> bool:
    judged = [trajectory for trajectory in group.trajectories if trajectory.judged]
    rewards = np.array([trajectory.reward for trajectory in judged])
    if policy.overlong_buffer:
        lengths = np.array([trajectory.completion_length for trajectory in judged], dtype=np.int64)
        rewards = rewards + soft_overlong_penalty(
            lengths, max_tokens=max_tokens, buffer=policy.overlong_buffer, factor=policy.overlong_penalty
        )
    return len(rewards) > 1 and bool(rewards.min() < rewards.max())


@dataclass(slots=True, kw_only=True)
class GroupFilter:
    """Says which groups are to be replaced, and counts what was generated for rollouts that train nothing.

    rounds: train.dynamic_sampling_rounds, in which groups of one wave are replaced; 0 replaces none.
    has_signal: whether a group is worth training.
    verifications: counts those of replaced groups too, so that a verifier that always fails cannot hide behind them.
    groups, tokens: replaced ones of the run so far, and what was generated for them.
    unlogged_tokens: generated for replaced groups and failed rollouts since `take_unlogged`.
    """

    rounds: int
    has_signal: Callable[[TrajectoryGroup], bool]
    verifications: FailureLimit
    groups: int = 0
    tokens: int = 0
    unlogged_tokens: int = 0

    def add(self, group: TrajectoryGroup) -> None:
        """Count a group that is replaced.

        Raises:
            TooManyFailuresError: more verifications than allowed have failed.
        """
        tokens = generated_tokens(group)
        self.groups += 1
        self.tokens += tokens
        self.unlogged_tokens += tokens
        self.verifications.add_verdicts([group])

    def add_failure(self, failure: RolloutFailure) -> None:
        """Count the tokens of a failed rollout; it is no filtered group."""
        self.unlogged_tokens += failure.tokens

    def take_unlogged(self) -> int:
        """Tokens that no row of metrics has counted yet; from now on one has."""
        found, self.unlogged_tokens = self.unlogged_tokens, 0
        return found
