"""Construction of the policy term's samples, with advantages, from trajectory groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from learners.objective.advantages import Float64Array, GroupEstimator, gae, group_advantages, token_returns, whiten
from learners.objective.losses import kl_estimate
from learners.objective.tree_advantages import tree_advantages
from learners.samples.types import DistillTokens, PolicyTokens, Sample
from rlsys.config.objective import ObjectiveConfig, PolicyConfig
from rlsys.types import BoolArray, Float32Array, Trajectory, TrajectoryGroup

WHITENED = ("gae", "reinforce_pp", "reinforce_pp_baseline")


class PolicyScorer(Protocol):
    """Scores of the policy's tokens in samples: [T] float32 per sample, 0 where its policy mask is False."""

    def old_logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """Return log-probabilities under the current policy, nats."""
        ...

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """Return log-probabilities under the reference policy, nats."""
        ...

    def values(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """Return the critic's estimates of the return that follows each token, made before the token."""
        ...


def policy_samples(
    groups: Sequence[TrajectoryGroup],
    objective: ObjectiveConfig,
    *,
    max_tokens: int,
    kl_weight: float,
    scorer: PolicyScorer,
) -> list[list[Sample]]:
    """Build the samples of every group with their advantages.

    Trajectories without a verdict (outcome "error" or "timeout") are left out of the samples, the baselines and every
    count. A group without any verdict gives an empty list. Sampled groups use `policy.estimator`, and estimators that
    whiten use all sampled groups of the step. Searched groups use `policy.tree_estimator`.

    Args:
        groups: trajectory groups of the step.
        objective: the joint objective.
        max_tokens: length limit of a completion, `sampling.max_tokens`, for overlong shaping.
        kl_weight: coefficient of the KL term in this step, in the reward or in the loss; 0 without a reference policy.
        scorer: called only for the scores that the objective needs.

    Returns:
        One list per group, in order.
    """
    shaping = objective.policy.overlong_shaping(max_tokens)
    shaped = [shaping.apply(group) for group in groups]
    by_group = [
        (_searched_samples if group.searched else _bare_samples)(group, number, objective.policy)
        for number, group in enumerate(shaped)
    ]
    if kl_weight:
        reference = iter(scorer.reference_logprobs([sample for samples in by_group for sample in samples]))
        by_group = [[_set(sample, reference_logprobs=next(reference)) for sample in samples] for samples in by_group]
    sampled = [number for number, group in enumerate(groups) if not group.searched]
    rewards = [np.array([t.reward for t in shaped[number].trajectories if t.judged]) for number in sampled]
    finished = _with_advantages([by_group[number] for number in sampled], rewards, objective, kl_weight, scorer)
    for number, samples in zip(sampled, finished, strict=True):
        by_group[number] = samples
    return by_group


def _bare_samples(group: TrajectoryGroup, group_number: int, policy: PolicyConfig) -> list[Sample]:
    """Return a sample for every judged trajectory, with advantages of 0."""
    return [
        Sample(
            token_ids=trajectory.token_ids,
            policy=PolicyTokens(
                mask=trajectory.loss_mask,
                behavior_logprobs=trajectory.behavior_logprobs,
                advantages=np.zeros(len(trajectory.token_ids), dtype=np.float32),
                teacher_logprobs=_anchor_logprobs(trajectory, policy),
            ),
            distill=_distill_tokens(trajectory, trajectory.loss_mask),
            origin=(group_number, number),
        )
        for number, trajectory in enumerate(group.trajectories)
        if trajectory.judged
    ]


def _with_advantages(
    groups: Sequence[Sequence[Sample]],
    rewards: Sequence[Float64Array],
    objective: ObjectiveConfig,
    kl_weight: float,
    scorer: PolicyScorer,
) -> list[list[Sample]]:
    """Return the samples of sampled groups with advantages, and with values and returns if there is a critic."""
    estimator = objective.policy.estimator
    samples = [sample for group in groups for sample in group]
    if objective.kl.in_reward and kl_weight:
        samples = _set_each(samples, "old_logprobs", scorer.old_logprobs(samples))
    penalties = iter([_kl_penalty(sample, objective, kl_weight) for sample in samples])
    if estimator == "gae":
        samples = _set_each(samples, "values", scorer.values(samples))
    remaining = iter(samples)
    rewarded = [
        _RewardedGroup([next(remaining) for _ in group], group_rewards, [next(penalties) for _ in group])
        for group, group_rewards in zip(groups, rewards, strict=True)
    ]
    advantages, returns = _estimate(rewarded, objective.policy)
    if estimator in WHITENED:
        advantages = whiten(advantages, [_mask(sample) for sample in samples])
    samples = _set_each(samples, "advantages", advantages)
    if returns is not None:
        samples = _set_each(samples, "returns", returns)
    finished = iter(samples)
    return [[next(finished) for _ in group] for group in groups]


def _kl_penalty(sample: Sample, objective: ObjectiveConfig, kl_weight: float) -> Float64Array:
    """Return the [T] KL penalty on the reward of each token; 0 unless the KL term is in the reward."""
    tokens = sample.policy
    if not objective.kl.in_reward or tokens is None or tokens.old_logprobs is None or tokens.reference_logprobs is None:
        return np.zeros(sample.length)
    # Use the estimator of the loss, which is in torch: numpy's expm1 rounds differently.
    old, reference = (
        torch.from_numpy(logprobs.astype(np.float64)) for logprobs in (tokens.old_logprobs, tokens.reference_logprobs)
    )
    estimate = kl_estimate(old, reference, estimator=objective.kl.estimator).numpy()
    return np.where(tokens.mask, kl_weight * estimate, 0.0)


# --- estimators of sampled groups ---


@dataclass(frozen=True, slots=True)
class _RewardedGroup:
    """n samples of one group, their rewards, [n], and the KL penalties of their tokens, [T] per sample."""

    samples: Sequence[Sample]
    rewards: Float64Array
    penalties: Sequence[Float64Array]

    def token_rewards(self) -> Iterator[tuple[Sample, Float64Array]]:
        """Yield every sample with its [T] token rewards: -penalty, plus the reward on the last trained token."""
        for sample, reward, penalty in zip(self.samples, self.rewards, self.penalties, strict=True):
            token_rewards = -penalty
            trained = np.flatnonzero(_mask(sample))
            if len(trained):
                token_rewards[trained[-1]] += reward
            yield sample, token_rewards


# [T] advantages of every sample, and [T] returns if there is a critic.
Estimate = tuple[list[Float64Array], list[Float64Array] | None]


def _estimate(groups: Sequence[_RewardedGroup], policy: PolicyConfig) -> Estimate:
    match policy.estimator:
        case "gae":
            return _critic_estimate(groups, policy)
        case "reinforce_pp":
            return _return_estimate(groups, policy.gamma), None
        case group_estimator:
            return _group_estimate(groups, group_estimator), None


def _critic_estimate(groups: Sequence[_RewardedGroup], policy: PolicyConfig) -> Estimate:
    """Return generalised advantage estimates and returns, from the critic's values in the samples."""
    advantages, returns = [], []
    for group in groups:
        for sample, rewards in group.token_rewards():
            assert sample.policy is not None and sample.policy.values is not None  # noqa: S101 - scored before
            values = sample.policy.values.astype(np.float64)
            estimate = gae(rewards, values, sample.policy.mask, gamma=policy.gamma, lam=policy.gae_lambda)
            advantages.append(estimate[0])
            returns.append(estimate[1])
    return advantages, returns


def _return_estimate(groups: Sequence[_RewardedGroup], gamma: float) -> list[Float64Array]:
    """Return the discounted returns of the tokens as advantages, without a baseline."""
    pairs = (pair for group in groups for pair in group.token_rewards())
    return [token_returns(rewards, _mask(sample), gamma) for sample, rewards in pairs]


def _group_estimate(groups: Sequence[_RewardedGroup], estimator: GroupEstimator) -> list[Float64Array]:
    """Return group advantages of rewards minus KL penalties, the same for all tokens of a sample."""
    advantages: list[Float64Array] = []
    for group in groups:
        penalties = np.array([float(penalty.sum()) for penalty in group.penalties])
        all_valid = np.ones(len(group.samples), dtype=np.bool_)
        estimate = group_advantages(group.rewards - penalties, all_valid, estimator=estimator)
        advantages += [
            np.full(sample.length, advantage) for sample, advantage in zip(group.samples, estimate, strict=True)
        ]
    return advantages


def _searched_samples(group: TrajectoryGroup, group_number: int, policy: PolicyConfig) -> list[Sample]:
    """Return samples in which every thought node of the group is trained once, with its own advantage.

    The first judged trajectory that holds a node trains it; in later trajectories the node is context. Tokens outside
    nodes and tokens that the policy did not choose are not trained. A trajectory without a trained token gives none.

    A node that was drawn s times stands for s samples of the policy. Its advantage is multiplied by s and divided by
    the mean of s over all trained tokens of the group, so that each group keeps its weight relative to other groups.
    """
    advantages = tree_advantages(group.trajectories, estimator=policy.tree_estimator, use_std=policy.tree_std)
    trained_nodes: set[int] = set()
    samples: list[Sample] = []
    draws: list[Float32Array] = []
    for number, trajectory in enumerate(group.trajectories):
        if not trajectory.judged:
            continue
        mask = np.zeros(len(trajectory.token_ids), dtype=np.bool_)
        token_advantages, token_draws = np.zeros((2, len(trajectory.token_ids)), dtype=np.float32)
        for step in trajectory.steps:
            if step.node not in trained_nodes:
                trained_nodes.add(step.node)
                span, node = slice(step.start, step.stop), advantages[step.node]
                mask[span] = trajectory.loss_mask[span]
                token_advantages[span] = node.advantage * node.draws
                token_draws[span] = node.draws
        if mask[1:].any():
            tokens = PolicyTokens(
                mask=mask,
                behavior_logprobs=trajectory.behavior_logprobs,
                advantages=token_advantages,
                teacher_logprobs=_anchor_logprobs(trajectory, policy),
            )
            distill = _distill_tokens(trajectory, mask)
            origin = (group_number, number)
            samples.append(Sample(token_ids=trajectory.token_ids, policy=tokens, distill=distill, origin=origin))
            draws.append(token_draws[1:][mask[1:]])
    mean = np.concatenate(draws).mean(dtype=np.float64) if draws else 1.0
    return [
        _set(sample, advantages=(sample.policy.advantages / mean).astype(np.float32))
        for sample in samples
        if sample.policy
    ]


def _distill_tokens(trajectory: Trajectory, mask: BoolArray) -> DistillTokens | None:
    """Return the tokens of a mask that a teacher scored; None without a teacher."""
    teacher = trajectory.teacher
    if teacher is None:
        return None
    return DistillTokens(mask=mask & teacher.mask, teacher=teacher, behavior_logprobs=trajectory.behavior_logprobs)


def _anchor_logprobs(trajectory: Trajectory, policy: PolicyConfig) -> Float32Array | None:
    """Return the teacher's log-probabilities of the tokens, [T]; None if the ratio has no share of a teacher."""
    return trajectory.teacher.logprobs[:, 0] if trajectory.teacher and policy.teacher_share else None


def _mask(sample: Sample) -> BoolArray:
    assert sample.policy is not None  # noqa: S101 - all samples here have policy tokens
    return sample.policy.mask


def _set(sample: Sample, **values: Any) -> Sample:
    assert sample.policy is not None  # noqa: S101 - all samples here have policy tokens
    return replace(sample, policy=replace(sample.policy, **values))


def _set_each(samples: Sequence[Sample], name: str, arrays: Sequence[np.ndarray]) -> list[Sample]:
    """Return the samples with the field `name` of their policy tokens set to one float32 array each."""
    return [_set(sample, **{name: array.astype(np.float32)}) for sample, array in zip(samples, arrays, strict=True)]
