"""Rows of the policy term: trajectory groups with an advantage for every token that the policy chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch

from learners.objective.advantages import gae, group_advantages, token_returns, whiten
from learners.objective.losses import kl_estimate
from learners.objective.tree_advantages import tree_advantages
from learners.samples.types import PolicyTokens, Row
from rlsys.config.objective import ObjectiveConfig, PolicyConfig
from rlsys.overlong import soft_overlong_penalty
from rlsys.types import Float32Array, TrajectoryGroup

WHITENED = ("gae", "reinforce_pp", "reinforce_pp_baseline")


class Scorer(Protocol):
    """Figures of the policy's tokens in rows: [T] float32 a row, 0 where its policy mask is False."""

    def old(self, rows: Sequence[Row]) -> list[Float32Array]:
        """Log-probabilities under the present policy."""
        ...

    def reference(self, rows: Sequence[Row]) -> list[Float32Array]:
        """Log-probabilities under the reference policy."""
        ...

    def values(self, rows: Sequence[Row]) -> list[Float32Array]:
        """The critic's estimates of the return from before each token on."""
        ...


def policy_rows(
    groups: Sequence[TrajectoryGroup], objective: ObjectiveConfig, *, max_tokens: int, kl_weight: float, scorer: Scorer
) -> list[list[Row]]:
    """Rows of every group with their advantages, one list a group, in order.

    Trajectories whose reward could not be computed (outcome "error" or "timeout") are left out, of the baseline and of
    every count. A group of which nothing is left gives an empty list. Sampled groups have the advantages of
    policy.estimator, those of a critic or whitened over all sampled groups; searched groups those of
    policy.tree_estimator.

    Args:
        max_tokens: sampling.max_tokens, for the overlong shaping of rewards.
        kl_weight: coefficient of the KL term in this step, in the reward or in the loss; 0 asks no reference policy.
        scorer: asked only for what the objective needs.
    """
    shaped = [_shaped(group, objective.policy, max_tokens) for group in groups]
    found = [_searched_rows(group, objective.policy) if group.searched else _bare_rows(group) for group in shaped]
    if kl_weight:
        reference = iter(scorer.reference([row for rows in found for row in rows]))
        found = [[_with(row, reference_logprobs=next(reference)) for row in rows] for rows in found]
    sampled = [number for number, group in enumerate(groups) if not group.searched]
    rewards = [np.array([t.reward for t in shaped[number].trajectories if t.judged]) for number in sampled]
    finished = _with_advantages([found[number] for number in sampled], rewards, objective, kl_weight, scorer)
    for number, rows in zip(sampled, finished, strict=True):
        found[number] = rows
    return found


def _shaped(group: TrajectoryGroup, policy: PolicyConfig, max_tokens: int) -> TrajectoryGroup:
    """The group with rewards that fall with the last tokens before the limit."""
    if not policy.overlong_buffer:
        return group
    lengths = np.array([trajectory.completion_length for trajectory in group.trajectories], dtype=np.int64)
    penalties = soft_overlong_penalty(
        lengths, max_tokens=max_tokens, buffer=policy.overlong_buffer, factor=policy.overlong_penalty
    )
    trajectories = (
        replace(trajectory, reward=trajectory.reward + float(penalty))
        for trajectory, penalty in zip(group.trajectories, penalties, strict=True)
    )
    return replace(group, trajectories=tuple(trajectories))


def _bare_rows(group: TrajectoryGroup) -> list[Row]:
    """A row for every judged trajectory, without advantages yet."""
    return [
        Row(
            token_ids=trajectory.token_ids,
            policy=PolicyTokens(
                mask=trajectory.loss_mask,
                behavior_logprobs=trajectory.behavior_logprobs,
                advantages=np.zeros(len(trajectory.token_ids), dtype=np.float32),
            ),
        )
        for trajectory in group.trajectories
        if trajectory.judged
    ]


def _with_advantages(
    groups: Sequence[Sequence[Row]],
    rewards: Sequence[np.ndarray],
    objective: ObjectiveConfig,
    kl_weight: float,
    scorer: Scorer,
) -> list[list[Row]]:
    """Sampled groups with their advantages, and with values and returns where there is a critic."""
    policy, sizes = objective.policy, [len(rows) for rows in groups]
    flat = [row for rows in groups for row in rows]
    if objective.kl.in_reward and kl_weight:
        flat = [_with(row, old_logprobs=old) for row, old in zip(flat, scorer.old(flat), strict=True)]
    penalties = [_penalty(row, objective, kl_weight) for row in flat]
    returns: list[np.ndarray] | None = None
    if policy.estimator == "gae":
        values = scorer.values(flat)
        flat = [_with(row, values=value) for row, value in zip(flat, values, strict=True)]
        ends = _token_rewards(flat, np.concatenate([*rewards, np.zeros(0)]), penalties)
        pairs = [
            gae(reward, value.astype(np.float64), _mask(row), gamma=policy.gamma, lam=policy.gae_lambda)
            for row, reward, value in zip(flat, ends, values, strict=True)
        ]
        advantages, returns = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    elif policy.estimator == "reinforce_pp":
        ends = _token_rewards(flat, np.concatenate([*rewards, np.zeros(0)]), penalties)
        advantages = [token_returns(reward, _mask(row), policy.gamma) for row, reward in zip(flat, ends, strict=True)]
    else:
        advantages = []
        for rows, found in zip(_split(flat, sizes), rewards, strict=True):
            taken = np.array([float(penalties[len(advantages) + n].sum()) for n in range(len(rows))])
            shares = group_advantages(found - taken, np.ones(len(rows), dtype=np.bool_), estimator=policy.estimator)
            advantages += [np.full(row.length, share) for row, share in zip(rows, shares, strict=True)]
    if policy.estimator in WHITENED:
        advantages = whiten(advantages, [_mask(row) for row in flat])
    flat = [
        _with(row, advantages=advantage.astype(np.float32)) for row, advantage in zip(flat, advantages, strict=True)
    ]
    if returns is not None:
        flat = [_with(row, returns=found.astype(np.float32)) for row, found in zip(flat, returns, strict=True)]
    return _split(flat, sizes)


def _penalty(row: Row, objective: ObjectiveConfig, kl_weight: float) -> np.ndarray:
    """[T] float64, what the KL term takes off the reward of each token."""
    tokens = row.policy
    if not objective.kl.in_reward or tokens is None or tokens.old_logprobs is None or tokens.reference_logprobs is None:
        return np.zeros(row.length)
    old, reference = (
        torch.from_numpy(found.astype(np.float64)) for found in (tokens.old_logprobs, tokens.reference_logprobs)
    )
    estimate = kl_estimate(old, reference, estimator=objective.kl.estimator).numpy()
    return np.where(tokens.mask, kl_weight * estimate, 0.0)


def _token_rewards(rows: Sequence[Row], rewards: np.ndarray, penalties: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[T] float64: minus the penalty, and the trajectory's reward at its last own token."""
    found = []
    for row, reward, penalty in zip(rows, rewards, penalties, strict=True):
        tokens = -penalty
        places = np.flatnonzero(_mask(row))
        if len(places):
            tokens[places[-1]] += reward
        found.append(tokens)
    return found


def _searched_rows(group: TrajectoryGroup, policy: PolicyConfig) -> list[Row]:
    """Every thought node is trained once, with its own advantage, as often as it counts.

    The first judged trajectory that holds a node trains it; in later ones it is context only. Tokens of no node, and
    those that the policy did not choose, are not trained. A trajectory in which nothing is left to train gives no row.

    A node that was drawn s times stands for s samples of the policy, so its advantage is multiplied by s, over the
    mean of s over all trained tokens of the group: the tokens of a group keep their weight beside other groups.
    """
    advantages = tree_advantages(
        group.trajectories, estimator=policy.tree_estimator, use_std=policy.estimator == "grpo"
    )
    trained: set[int] = set()
    rows: list[Row] = []
    draws: list[np.ndarray] = []
    for trajectory in group.trajectories:
        if not trajectory.judged:
            continue
        mask = np.zeros(len(trajectory.token_ids), dtype=np.bool_)
        per_token, drawn = np.zeros((2, len(trajectory.token_ids)), dtype=np.float32)
        for step in trajectory.steps:
            if step.node not in trained:
                trained.add(step.node)
                tokens, node = slice(step.start, step.stop), advantages[step.node]
                mask[tokens] = trajectory.loss_mask[tokens]
                per_token[tokens] = node.advantage * node.draws
                drawn[tokens] = node.draws
        if mask[1:].any():
            tokens_of = PolicyTokens(mask=mask, behavior_logprobs=trajectory.behavior_logprobs, advantages=per_token)
            rows.append(Row(token_ids=trajectory.token_ids, policy=tokens_of))
            draws.append(drawn[1:][mask[1:]])
    mean = np.concatenate(draws).mean(dtype=np.float64) if draws else 1.0
    return [_with(row, advantages=(row.policy.advantages / mean).astype(np.float32)) for row in rows if row.policy]


def _mask(row: Row) -> np.ndarray:
    assert row.policy is not None  # noqa: S101 - made here
    return row.policy.mask


def _with(row: Row, **values: Any) -> Row:
    assert row.policy is not None  # noqa: S101 - made here
    return replace(row, policy=replace(row.policy, **values))


def _split(rows: Sequence[Row], sizes: Sequence[int]) -> list[list[Row]]:
    stops = accumulate(sizes, initial=0)
    return [list(rows[start:stop]) for start, stop in pairwise(stops)]
