"""Optimizer updates against plain torch: gradients, gradient norms of terms, and the critic."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from joint_samples import group, random_preferences, trajectory
from plain_rank import (
    EVERY_TERM,
    RATE,
    TEMPERATURE,
    build,
    chain,
    distribution,
    everything,
    logprob,
    plain_rank,
    sampled,
    tree,
)
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from learners.deepspeed.reference import ReferencePolicy
from rlsys.errors import NonFiniteLossError
from rlsys.types import TrainingBatch

pytestmark = pytest.mark.usefixtures("process_group")

ENTROPY_COEF = 0.5
BAND = 1e-3  # far less than a value moves in an update


def last_layer_norm(module: Any, loss: Tensor) -> float:
    gradients = torch.autograd.grad(loss, list(module.model.layers[-1].parameters()), retain_graph=True)
    return math.sqrt(sum(float(part.square().sum()) for part in gradients))


def test_gradient_norms_of_terms_are_those_of_plain_torch() -> None:
    groups, pairs = sampled(2), random_preferences(3)
    rows = [chain([5, 6, 7], 1), chain([5, 6, 7, 8, 9], 2)]
    objective = {
        "policy": {"estimator": "dr_grpo", "importance_cap": None, "entropy_coef": ENTROPY_COEF},
        "kl": {"weight": 0.25, "estimator": "k2"},
        "preference": {"weight": 0.5, "source": "file", "beta": 0.3},
        "sft": {"weight": 2.0, "source": "demonstrations"},
        "grad_norm_interval": 1,
    }
    rank = plain_rank(objective, budget=24)  # several micro-batches
    module, reference = copy.deepcopy(rank.policy.module), rank.reference.module
    metrics = rank.train(TrainingBatch(groups=tuple(groups), pairs=tuple(pairs), demonstrations=tuple(rows)), 0, 1)

    policy, kl, tokens = torch.zeros(()), torch.zeros(()), 0
    for row in (row for part in groups for row in part.trajectories):
        own = logprob(module, row.token_ids, 2, TEMPERATURE)
        other = logprob(reference, row.token_ids, 2, TEMPERATURE).detach()
        policy = policy - (row.reward - 0.5) * (own - own.detach()).exp().sum()
        likely = distribution(module, row.token_ids, TEMPERATURE)[1:]
        policy = policy + ENTROPY_COEF * (likely.exp() * likely).sum()
        kl = kl + (own - other).square().sum() / 2
        tokens += len(own)
    preference = torch.zeros(())
    for pair in pairs:
        chosen = logprob(module, pair.chosen_ids, pair.common).sum() - pair.chosen_reference
        rejected = logprob(module, pair.rejected_ids, pair.common).sum() - pair.rejected_reference
        preference = preference - nn.functional.logsigmoid(0.3 * (chosen - rejected)) / 3
    sft = -torch.cat([logprob(module, rows[0].token_ids, 1), logprob(module, rows[1].token_ids, 2)]).mean()

    losses = {"policy": policy / tokens, "kl": 0.25 * kl / tokens, "preference": 0.5 * preference, "sft": 2 * sft}
    norms = {term: last_layer_norm(module, loss) for term, loss in losses.items()}
    for term, norm in norms.items():
        assert metrics[f"objective/{term}_grad_norm"] == pytest.approx(norm, rel=1e-5), term
        assert metrics[f"objective/{term}_grad_share"] == pytest.approx(norm / sum(norms.values()), rel=1e-5)
    assert metrics["objective/kl_loss"] == pytest.approx(losses["kl"].item() / 0.25, rel=1e-5)
    # The update is one step of gradient descent on the sum.
    gradient = torch.autograd.grad(sum(losses.values()), list(module.parameters()))
    norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
    assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["learner/loss"] == pytest.approx(sum(loss.item() for loss in losses.values()), rel=1e-5)
    expected = torch.cat([(p - RATE * g).flatten() for p, g in zip(module.parameters(), gradient, strict=True)])
    torch.testing.assert_close(rank.policy.vector(), expected, rtol=1e-5, atol=1e-7)


def test_kl_in_the_reward_is_that_of_plain_torch() -> None:
    objective = {
        "policy": {"estimator": "dr_grpo", "importance_cap": None},
        "kl": {"weight": 0.5, "in_reward": True, "estimator": "k1"},
    }
    groups = sampled(2)
    rank = plain_rank(objective)
    module, reference = copy.deepcopy(rank.policy.module), rank.reference.module
    metrics = rank.train(TrainingBatch(groups=tuple(groups)), 0, 1)
    # Every reward minus 0.5 times the summed log-ratios of its tokens, then minus the mean of its group.
    loss, tokens = torch.zeros(()), 0
    for part in groups:
        own = [logprob(module, row.token_ids, 2, TEMPERATURE) for row in part.trajectories]
        other = [logprob(reference, row.token_ids, 2, TEMPERATURE) for row in part.trajectories]
        gaps = torch.stack([(a - b).sum().detach() for a, b in zip(own, other, strict=True)])
        rewards = torch.tensor([row.reward for row in part.trajectories]) - 0.5 * gaps
        for advantage, mine in zip(rewards - rewards.mean(), own, strict=True):
            loss = loss - advantage * mine.sum()
            tokens += len(mine)
    gradient = torch.autograd.grad(loss / tokens, list(module.parameters()))
    expected = torch.cat([(p - RATE * g).flatten() for p, g in zip(module.parameters(), gradient, strict=True)])
    torch.testing.assert_close(rank.policy.vector(), expected, rtol=1e-5, atol=1e-7)
    norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
    assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert "objective/kl_loss" not in metrics


def test_measuring_the_gradient_norms_changes_nothing() -> None:
    vectors = []
    for interval in (0, 1):
        rank = plain_rank({**EVERY_TERM, "grad_norm_interval": interval}, updates=2)
        metrics = rank.train(everything(), 0, 1)
        assert ("objective/sft_grad_norm" in metrics) == bool(interval)
        vectors.append(rank.policy.vector())
    assert torch.equal(*vectors)
    every_second = plain_rank({**EVERY_TERM, "grad_norm_interval": 2})
    assert "objective/sft_grad_norm" not in every_second.train(everything(), 1, 2)


def test_an_update_without_targets_is_not_made() -> None:
    # Another model has written the whole tree.
    foreign = group(trajectory([1, 2, 9], [0, 0, 0], 1.0), trajectory([1, 2, 8], [0, 0, 0], 0.0))
    for objective in ({}, {"policy": {"estimator": "gae"}, "value": {"weight": 1.0}, "kl": {"weight": 0.1}}):
        rank = plain_rank(objective, updates=1)
        before = rank.policy.vector()
        metrics = rank.train(TrainingBatch(groups=(foreign, foreign)), 0, 1)
        assert (metrics["learner/updates"], rank.policy.updates) == (0, 0)
        assert torch.equal(rank.policy.vector(), before)


EQUAL = group(trajectory([1, 2, 9, 4], [0, 0, 1, 1], 1.0), trajectory([1, 2, 8, 5], [0, 0, 1, 1], 1.0))
NO_KL = {"policy": {"estimator": "grpo"}}


@pytest.mark.parametrize(
    ("objective", "left_out"),
    [
        (NO_KL, 1 / 3),
        ({"policy": {"estimator": "dr_grpo", "surrogate": "cispo", "aggregation": "constant"}}, 1 / 3),
        ({**NO_KL, "kl": {"weight": 0.1, "in_reward": True}}, 0.0),
        ({**NO_KL, "kl": {"weight": 0.1}}, 0.0),
        ({"policy": {"estimator": "grpo", "entropy_coef": 0.1}}, 0.0),
        ({"policy": {"estimator": "gae"}, "value": {"weight": 1.0}}, 0.0),
    ],
    ids=["grpo", "cispo", "kl in the reward", "kl", "entropy", "gae"],
)
@pytest.mark.parametrize("updates", [1, 2])
def test_samples_without_a_gradient_are_left_out_and_change_nothing(
    objective: dict[str, Any], left_out: float, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = TrainingBatch(groups=(*sampled(2), EQUAL, EQUAL))
    vectors, tokens, norms = [], [], []
    for everything_is_trained in (False, True):
        if everything_is_trained:
            monkeypatch.setattr("learners.training_step.changes_weights", lambda *_: True)
            monkeypatch.setattr("learners.rank.policy_changes_weights", lambda *_: True)
        rank = plain_rank(objective, updates=updates)
        metrics = rank.train(batch, 0, 1)
        vectors.append(rank.policy.vector())
        tokens.append(metrics["learner/tokens"])
        norms.append([metrics["learner/grad_norm"], metrics["objective/policy_denominator"], metrics["learner/loss"]])
        if not everything_is_trained:
            assert metrics["learner/left_out_share"] == pytest.approx(left_out)
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-6, atol=1e-7)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert (tokens[0] < tokens[1]) == bool(left_out)


def test_an_update_without_any_gradient_is_made_as_one_with_a_gradient_of_0() -> None:
    rank = plain_rank(NO_KL)
    before = rank.policy.vector()
    metrics = rank.train(TrainingBatch(groups=(EQUAL, EQUAL)), 0, 1)
    assert (metrics["learner/updates"], rank.policy.updates, metrics["learner/grad_norm"]) == (1, 1, 0)
    assert (metrics["learner/left_out_share"], metrics["learner/tokens"]) == (1, 0)
    assert "learner/entropy" not in metrics
    assert torch.equal(rank.policy.vector(), before)  # of plain gradient descent


@pytest.mark.parametrize("spoilt", ["policy", "critic"])
def test_no_model_is_updated_if_one_of_them_is_not_finite(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = plain_rank(EVERY_TERM)
    models = [rank.policy, rank.critic]
    before = [model.vector() for model in models]

    def refuse() -> None:
        raise NonFiniteLossError(f"gradient of the {spoilt} is not finite")

    monkeypatch.setattr(getattr(rank, spoilt), "check_finite", refuse)
    with pytest.raises(NonFiniteLossError, match=f"gradient of the {spoilt} is not finite"):
        rank.train(everything(), 0, 1)
    assert [model.updates for model in models] == [0, 0]
    assert all(torch.equal(model.vector(), vector) for model, vector in zip(models, before, strict=True))


def test_the_critic_learns_from_sampled_groups_alone() -> None:
    groups = sampled(3)
    tokens = sum(each.completion_length for part in groups for each in part.trajectories)
    objective = {"policy": {"estimator": "gae"}, "value": {"weight": 0.5}}
    alone, with_tree = plain_rank(objective), plain_rank(objective)
    expected = alone.train(TrainingBatch(groups=tuple(groups)), 0, 1)
    metrics = with_tree.train(TrainingBatch(groups=(*groups, tree())), 0, 1)
    assert metrics["objective/value_denominator"] == tokens
    assert metrics["objective/policy_denominator"] > tokens
    for name in ("objective/value_loss", "objective/value_grad_norm", "value/mean", "value/explained_variance"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6)
    torch.testing.assert_close(with_tree.critic.vector(), alone.critic.vector(), rtol=1e-6, atol=1e-8)


def test_the_value_loss_is_that_of_plain_torch() -> None:
    groups = sampled(2)
    rank = plain_rank({"policy": {"estimator": "gae", "gae_lambda": 1.0}, "value": {"weight": 0.5}}, budget=24)
    critic = copy.deepcopy(rank.critic.module)
    metrics = rank.train(TrainingBatch(groups=tuple(groups)), 0, 1)
    # With lambda 1 and gamma 1 the return of every token is the reward of its trajectory.
    errors = []
    for row in (row for part in groups for row in part.trajectories):
        values = critic(torch.tensor(row.token_ids[None], dtype=torch.int64))[0, 1:-1]
        errors.append(values - row.reward)
    loss = torch.cat(errors).square().mean() / 2
    assert metrics["objective/value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["value/squared_error"] == pytest.approx(2 * loss.item(), rel=1e-5)
    gradient = torch.autograd.grad(0.5 * loss, list(critic.parameters()), allow_unused=True)
    norm = math.sqrt(sum(float(part.square().sum()) for part in gradient if part is not None))
    assert metrics["objective/value_grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_value_clipping_acts_in_a_second_update() -> None:
    # Two equal groups, one for each update, so that it does not matter which comes first.
    (sampled_group,) = sampled(1)
    value = {"weight": 0.5, "clip": BAND}
    rank = plain_rank({"policy": {"estimator": "gae", "gae_lambda": 1.0}, "value": value}, updates=2)
    critic = copy.deepcopy(rank.critic.module)
    metrics = rank.train(TrainingBatch(groups=(sampled_group, sampled_group)), 0, 1)
    rows = [torch.tensor(row.token_ids[None], dtype=torch.int64) for row in sampled_group.trajectories]
    # The return of every token is the reward of its trajectory.
    returns = torch.cat(
        [
            torch.full((row.shape[1] - 2,), part.reward)
            for row, part in zip(rows, sampled_group.trajectories, strict=True)
        ]
    )
    old, losses, clipped = None, [], 0
    for _ in range(2):
        values = torch.cat([critic(row)[0, 1:-1] for row in rows])
        old = values.detach() if old is None else old
        errors = (values - returns).square()
        inside = (torch.minimum(torch.maximum(values, old - BAND), old + BAND) - returns).square()
        clipped = int((inside > errors).sum())
        losses.append(torch.maximum(errors, inside).mean() / 2)
        gradients = torch.autograd.grad(0.5 * losses[-1], list(critic.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(critic.parameters(), gradients, strict=True):
                parameter -= 0 if gradient is None else RATE * gradient
    assert 0 < clipped < len(returns)
    assert metrics["value/clipped_fraction"] == clipped / (2 * len(returns))
    assert metrics["objective/value_loss"] == pytest.approx(sum(loss.item() for loss in losses) / 2, rel=1e-5)
    expected = torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])
    torch.testing.assert_close(rank.critic.vector(), expected, rtol=1e-5, atol=1e-7)


def test_in_the_warm_up_only_the_critic_moves() -> None:
    objective = {
        "policy": {"estimator": "gae"},
        "value": {"weight": 0.5, "warmup_steps": 1},
        "kl": {"weight": 0.1},
        "grad_norm_interval": 1,
    }
    rank = plain_rank(objective, updates=2)
    policy, critic = rank.policy.vector(), rank.critic.vector()
    rank.reference = None  # must not be used
    metrics = rank.train(TrainingBatch(groups=tuple(sampled(4))), 0, 1)
    assert torch.equal(rank.policy.vector(), policy)
    assert not torch.equal(rank.critic.vector(), critic)
    assert (rank.policy.updates, rank.critic.updates) == (0, 2)
    assert not [name for name in metrics if "policy" in name or "kl" in name]
    # Losses are means over updates: 0.5 * squared error. The metric squared_error is a mean over the tokens of both.
    assert metrics["learner/loss"] == pytest.approx(0.5 * metrics["objective/value_loss"], rel=1e-12)
    assert metrics["objective/value_loss"] == pytest.approx(metrics["value/squared_error"] / 2, rel=0.2)
    rank.reference = ReferencePolicy(build(Qwen2ForCausalLM, 2), rank.settings)
    rank.train(TrainingBatch(groups=tuple(sampled(4))), 1, 2)
    assert rank.policy.updates == 2
