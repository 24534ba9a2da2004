"""Dynamic sampling: decides which groups have no learning signal, and counts the cost of replacing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlsys.config.objective import ObjectiveConfig
from rlsys.control.budgets import FailureLimit
from rlsys.control.rollout_metrics import generated_tokens
from rlsys.types import RolloutFailure, TrajectoryGroup


def has_signal(group: TrajectoryGroup, objective: ObjectiveConfig, max_tokens: int) -> bool:
    """Return whether a group has a learning signal: it ranks its chains for a term of the objective.

    For the policy term, two judged rewards must differ, after the overlong shaping if objective.policy.overlong_buffer
    asks for it. For the terms preference and sft, the group must contain the pairs, step preferences or demonstrations
    that the term takes from the trees of the step.

    The rule looks at rewards and ignores the estimator. The estimators reinforce_pp and gae also learn from equal
    rewards, and the term kl and the critic learn from every group; none of this counts as a signal. A tree whose
    rewards differ has a signal even if its estimator compares none of them, for example if every right answer followed
    a hint. Without a policy term no sampled group is better than another, so all sampled groups pass.

    Args:
        max_tokens: sampling.max_tokens, for the shaping.

    Source: DAPO, arXiv:2503.14476, sec. 3.2, which asks for right and wrong answers, before any shaping.
    """
    policy, preference, sft = objective.policy, objective.preference, objective.sft
    compares = policy.used or objective.ranking.used
    if objective.distill.on_chains or not (compares or group.searched):
        return True
    if compares and policy.overlong_shaping(max_tokens).rewards_differ(group):
        return True
    own_pairs = group.pairs if preference.pairs == "chains" else group.step_preferences
    paired = preference.used or (sft.used and sft.source == "chosen")
    if paired and preference.source == "search" and own_pairs:
        return True
    return sft.used and sft.source == "trees" and bool(group.demonstrations)


@dataclass(slots=True, kw_only=True)
class GroupFilter:
    """Filter of groups without a learning signal, and count of the tokens that are not trained.

    Attributes:
        rounds: rounds in which groups of one wave are replaced, train.dynamic_sampling_rounds; 0 replaces none.
        has_signal: returns whether a group has a learning signal.
        verifications: counts the verifications of replaced groups too, so that a broken verifier cannot go unnoticed.
        groups: replaced groups so far.
        tokens: tokens of the replaced groups.
        unlogged_tokens: tokens of replaced groups and failed rollouts since the last `take_unlogged`.
    """

    rounds: int
    has_signal: Callable[[TrajectoryGroup], bool]
    verifications: FailureLimit
    groups: int = 0
    tokens: int = 0
    unlogged_tokens: int = 0

    def add(self, group: TrajectoryGroup) -> None:
        """Count a replaced group.

        Raises:
            TooManyFailuresError: more verifications than allowed have failed.
        """
        tokens = generated_tokens(group)
        self.groups += 1
        self.tokens += tokens
        self.unlogged_tokens += tokens
        self.verifications.add_verdicts([group])

    def add_failure(self, failure: RolloutFailure) -> None:
        """Count the tokens of a failed rollout, which is not a filtered group."""
        self.unlogged_tokens += failure.tokens

    def take_unlogged(self) -> int:
        """Return the tokens that no row of metrics contains yet, for a row that will contain them."""
        tokens, self.unlogged_tokens = self.unlogged_tokens, 0
        return tokens
