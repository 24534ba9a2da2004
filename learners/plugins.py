"""Losses and estimators of the user's own, which the config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from rlsys.config.objective import ESTIMATORS, CustomLossConfig, ObjectiveConfig
from rlsys.errors import ConfigError
from rlsys.plugins import command_folder, load_function

if TYPE_CHECKING:
    from torch import Tensor

LOSS, ESTIMATOR = "objective.custom.fn", "objective.policy.estimator"


def check_plugins(objective: ObjectiveConfig) -> None:
    """Import the functions of an objective, and call each once with small values.

    Raises:
        ConfigError: A function cannot be imported, or returns something else than it should.
    """
    if objective.policy.used and objective.policy.estimator not in ESTIMATORS:
        custom_advantages(np.array([0.0, 1.0]), objective.policy.estimator)
    if objective.custom.used:
        import torch

        names = ("behavior_logprobs", "advantages", "weights")
        tokens = {name: torch.full((2,), 0.5) for name in names}
        custom_loss(torch.full((2,), -0.5, requires_grad=True), tokens, objective.custom)


def custom_advantages(rewards: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Return the advantages of the n completions of one prompt, from an estimator of the user.

    Args:
        rewards: [n], all with a verdict.
        name: see `rlsys.plugins.PluginName`.

    Raises:
        ConfigError: The estimator does not return n finite numbers, or raises.
    """
    values = _called(name, ESTIMATOR, rewards.copy())
    advantages = np.asarray(values, dtype=np.float64) if not isinstance(values, str) else np.zeros(0)
    if advantages.shape != rewards.shape or not np.isfinite(advantages).all():
        count = len(rewards)
        message = f"expected {count} finite numbers for {count} rewards, found {values!r}"
        raise ConfigError(f"{ESTIMATOR} {name!r}: {message[:300]}")
    return advantages


def custom_loss(logprobs: Tensor, tokens: Mapping[str, Tensor], config: CustomLossConfig) -> Tensor:
    """Return the loss of the user on the tokens of the policy term.

    Args:
        logprobs: [M] nats; carries gradient.
        tokens: [M] each: behavior_logprobs, advantages, and weights, by which the loss of every token is multiplied.
        config: section `objective.custom`.

    Raises:
        ConfigError: The function does not return a tensor of one number, or raises.
    """
    assert config.fn is not None  # noqa: S101 - the config is checked
    value = _called(config.fn, LOSS, logprobs, **tokens, **config.arguments)
    if getattr(value, "numel", int)() != 1:
        given = f"a tensor of shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        raise ConfigError(f"{LOSS} {config.fn!r}: expected a tensor of one number, sum(weights * loss), found {given}")
    return value.reshape(())


def _called(name: str, field: str, *arguments: Any, **named: Any) -> Any:
    function = _function(name, field)
    try:
        return function(*arguments, **named)
    except Exception as error:
        raise ConfigError(f"{field} {name!r}: {type(error).__name__}: {error}") from error


@cache
def _function(name: str, field: str) -> Callable[..., Any]:
    return load_function(name, command_folder(), field)
