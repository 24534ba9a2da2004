"""Training on episodes: the texts of an environment are read and never trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from joint_samples import group, trajectory
from plain_rank import RATE, TEMPERATURE, logprob, plain_rank

from rlsys.types import Demonstration, TrainingBatch

pytestmark = pytest.mark.usefixtures("process_group")

OWN = [0, 0, 1, 1, 0, 0, 1, 1]  # two turns of two tokens, and a reply of two tokens between them
EPISODES = group(
    trajectory([1, 2, 10, 11, 30, 31, 12, 13], OWN, 1.0),
    trajectory([1, 2, 10, 14, 32, 33, 12, 15], OWN, 0.0),
    trajectory([1, 2, 16], [0, 0, 1], 0.0),
)
OBJECTIVE: dict[str, Any] = {
    "policy": {"estimator": "dr_grpo", "importance_cap": None},
    "kl": {"weight": 0.25, "estimator": "k2"},
    "sft": {"weight": 0.5, "source": "demonstrations"},
}


def batch(episodes: Any = EPISODES, reply: tuple[int, int] = (30, 31)) -> TrainingBatch:
    shown = np.array([1, 2, 10, 11, *reply, 12, 13], dtype=np.int32)
    row = Demonstration(token_ids=shown, loss_mask=np.array(OWN, dtype=np.bool_))
    return TrainingBatch(groups=(episodes,), demonstrations=(row,))


@pytest.mark.parametrize("budget", [16, 64])  # a row for each episode, and rows that episodes share
def test_an_update_on_episodes_is_that_of_plain_torch(budget: int) -> None:
    rank = plain_rank(OBJECTIVE, budget=budget)
    module, reference = copy.deepcopy(rank.policy.module), rank.reference.module
    metrics = rank.train(batch(), 0, 1)
    policy, kl, tokens = torch.zeros(()), torch.zeros(()), 0
    for episode in EPISODES.trajectories:
        mask = torch.tensor(episode.loss_mask.tolist())[2:]
        # Every token is predicted from all tokens before it, those of the environment included.
        own = logprob(module, episode.token_ids, 2, TEMPERATURE)[mask]
        other = logprob(reference, episode.token_ids, 2, TEMPERATURE).detach()[mask]
        policy = policy - (episode.reward - 1 / 3) * (own - own.detach()).exp().sum()
        kl = kl + (own - other).square().sum() / 2
        tokens += int(mask.sum())
    assert tokens == 9
    [row] = batch().demonstrations
    sft = -logprob(module, row.token_ids, 2)[torch.tensor(OWN, dtype=torch.bool)[2:]].mean()
    gradient = torch.autograd.grad(policy / tokens + 0.25 * kl / tokens + 0.5 * sft, list(module.parameters()))
    expected = torch.cat([(p - RATE * g).flatten() for p, g in zip(module.parameters(), gradient, strict=True)])
    torch.testing.assert_close(rank.policy.vector(), expected, rtol=1e-5, atol=1e-7)
    assert metrics["objective/policy_denominator"] == 9 and metrics["objective/sft_denominator"] == 4


def test_a_reply_changes_the_update_only_by_what_follows_it() -> None:
    def trained(episodes: Any, **changes: Any) -> torch.Tensor:
        rank = plain_rank({**OBJECTIVE, "policy": {"estimator": "gae"}, "value": {"weight": 0.5}})
        rank.train(batch(episodes, **changes), 0, 1)
        return rank.policy.vector()

    unchanged = trained(EPISODES)
    garbage = [
        replace(each, behavior_logprobs=np.where(each.loss_mask, each.behavior_logprobs, -99).astype(np.float32))
        for each in EPISODES.trajectories
    ]
    assert torch.equal(trained(replace(EPISODES, trajectories=tuple(garbage))), unchanged)
    first = EPISODES.trajectories[0]
    other = replace(first, token_ids=np.where(first.token_ids == 31, 40, first.token_ids).astype(np.int32))
    assert not torch.equal(trained(replace(EPISODES, trajectories=(other, *EPISODES.trajectories[1:]))), unchanged)
    assert not torch.equal(trained(EPISODES, reply=(30, 40)), unchanged)
