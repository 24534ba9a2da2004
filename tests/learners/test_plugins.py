"""Losses and estimators of the user's own, in real steps against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plain_rank import RATE, TEMPERATURE, build, logprob, plain_rank, sampled
from transformers import Qwen2ForCausalLM

from learners.objective.advantages import group_advantages
from learners.plugins import check_plugins, custom_loss
from rlsys.config.objective import CustomLossConfig, ObjectiveConfig
from rlsys.errors import ConfigError
from rlsys.types import TrainingBatch

LOSS: dict[str, Any] = {
    "policy": {"estimator": "dr_grpo"},
    "custom": {"weight": 0.5, "fn": "plugged:z_loss"},
}


@pytest.mark.usefixtures("process_group")
def test_a_step_goes_down_the_gradient_of_the_loss() -> None:
    groups = sampled(1)
    rank, without = plain_rank(LOSS), plain_rank({"policy": {"estimator": "dr_grpo"}})
    metrics = rank.train(TrainingBatch(groups=tuple(groups)), 0, 1)
    without.train(TrainingBatch(groups=tuple(groups)), 0, 1)
    module = build(Qwen2ForCausalLM, 0)
    chains = [t.token_ids.tolist() for group in groups for t in group.trajectories]
    own = torch.cat([logprob(module, tokens, 2, TEMPERATURE) for tokens in chains])
    loss = own.square().mean()
    assert metrics["objective/custom_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["objective/custom_denominator"] == metrics["objective/policy_denominator"] == len(own)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
    moved = rank.policy.vector() - without.policy.vector()
    torch.testing.assert_close(moved, -RATE * 0.5 * gradient.to(moved), rtol=0, atol=1e-7)


def test_an_estimator_gives_the_advantages() -> None:
    rewards = np.array([0.0, 1.0, 0.25, 9.0])
    valid = np.array([True, True, True, False])
    assert group_advantages(rewards, valid, estimator="plugged:max_baseline").tolist() == [-1.0, 0.0, -0.75, 0.0]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"policy": {"estimator": "plugged:wrong_shape"}}, "expected 2 finite numbers for 2 rewards"),
        ({"policy": {"estimator": "plugged:raises"}}, "objective.policy.estimator 'plugged:raises': KeyError: 'mine'"),
        ({"policy": {"estimator": "plugged:nothing"}}, "plugged has no 'nothing'"),
        ({"custom": {"weight": 1, "fn": "plugged:raises"}}, "objective.custom.fn 'plugged:raises': KeyError: 'mine'"),
        ({"custom": {"weight": 1, "fn": "plugged:wrong_shape"}}, "expected a tensor of one number"),
        ({"custom": {"weight": 1, "fn": "no_such:z"}}, "cannot import no_such"),
    ],
)
def test_a_wrong_function_is_refused_before_the_first_step(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_plugins(ObjectiveConfig.model_validate(objective))
    assert message in str(error.value)


def test_right_functions_are_accepted() -> None:
    check_plugins(ObjectiveConfig.model_validate(LOSS))
    check_plugins(ObjectiveConfig.model_validate({"policy": {"estimator": "plugged:max_baseline"}}))


def test_arguments_reach_the_loss() -> None:
    config = CustomLossConfig(weight=1, fn="plugged:z_loss", arguments={"scale": 2})
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    tokens = {"weights": torch.tensor([0.5, 0.25])}
    assert custom_loss(logprobs, tokens, config).item() == pytest.approx(0.5 * 1 + 0.25 * 4)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"custom": {"weight": 1}}, "custom.weight needs custom.fn"),
        (
            {"custom": {"weight": 1, "fn": "a:b"}, "policy": {"weight": 0}, "sft": {"weight": 1}},
            "policy.weight above 0",
        ),
        ({"custom": {"fn": "a:b"}}, "custom.fn has no effect with custom.weight 0"),
    ],
)
def test_a_loss_without_effect_is_refused(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="custom") as error:
        ObjectiveConfig.model_validate(objective)
    assert message in str(error.value)
