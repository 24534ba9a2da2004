"""Environments, which answer the turns of a policy: tools, games and checks of the user, and those that ship."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from rlsys.config.environment import EnvironmentConfig
from rlsys.errors import ConfigError
from rlsys.interfaces import Environment, Reply
from rlsys.plugins import load_plugin
from rlsys.tasks import calculator, guess, multi_if
from rlsys.types import Problem

__all__ = ["Game", "Reply", "build_environment"]

BUILT_IN: dict[str, Environment] = {"calculator": calculator.reply, "guess": guess.reply, "multi_if": multi_if.reply}


class Game(ABC):
    """An environment with a state. For every reply, a new instance plays all turns of the episode again.

    So an episode of T turns makes T(T+1)/2 steps, and a step must be a function of the problem and the turns before:
    a game that draws random numbers takes a seed from the problem.
    """

    def __init__(self, problem: Problem, **arguments: Any) -> None:
        self.problem = problem

    def start(self) -> Reply:
        """Return the text before the first turn of the policy."""
        return Reply()

    @abstractmethod
    def step(self, turn: str) -> Reply:
        """Return the reply to a turn of the policy."""


def build_environment(config: EnvironmentConfig, folder: str) -> Environment:
    """Return the environment of a section that names one.

    Args:
        config: the section; see `rlsys.config.environment.active_environment`.
        folder: see `load_plugin`.

    Raises:
        ConfigError: the environment cannot be imported or called.
    """
    name, arguments = str(config.fn), config.arguments
    plugin: Any = BUILT_IN.get(name) or load_plugin(name, folder, "environment.fn")
    is_game = inspect.isclass(plugin) and issubclass(plugin, Game)
    if (inspect.isclass(plugin) and not is_game) or not callable(plugin):
        kind = f"the class {plugin.__name__}" if inspect.isclass(plugin) else type(plugin).__name__
        raise ConfigError(
            f"environment.fn {name!r}: expected a function of a problem and turns, or a class derived from "
            f"rlsys.environments.Game, found {kind}"
        )
    given = (None,) if is_game else (None, ())
    try:
        inspect.signature(plugin).bind(*given, **arguments)
    except TypeError as error:
        taken = ["problem", *([] if is_game else ["turns"]), *(f"{key}={value!r}" for key, value in arguments.items())]
        called = f"{name.rpartition(':')[2]}({', '.join(taken)})"
        raise ConfigError(f"environment.fn {name!r}: it is called as {called}: {error}") from None

    def play(problem: Problem, turns: Sequence[str]) -> Reply:
        if not is_game:
            return plugin(problem, turns, **arguments)
        game = plugin(problem, **arguments)
        reply = game.start()
        for turn in turns:
            reply = game.step(turn)
        return reply

    return play
