"""The schema of the section `environment`, and the environment that a config has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from rlsys.config.outside_tasks import BenchmarkConfig
from rlsys.config.section import Section
from rlsys.config.tasks import GuessConfig, SumsConfig, TaskConfig
from rlsys.plugins import PluginName

STOP_STRINGS = {"calculator": ("</tool>",), "guess": ("</guess>",)}
"""Environments that ship, and the strings that end a turn in them."""
ROLES: Mapping[str, Literal["user", "tool"]] = {"multi_if": "user"}
"""Environments that ship whose replies are messages, and the role of these."""


class EnvironmentConfig(Section):
    fn: Literal["calculator", "guess", "multi_if"] | PluginName | None = None
    """`module:name` or `file.py:name` of a function or a Game, or `calculator` (docs/environments.md). It answers every
    turn of the policy. null: that of the task, if it has one."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of every call, by name."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a turn, in addition to end tokens; empty: those of an environment that ships. None with a
    role."""
    role: Literal["user", "tool"] | None = None
    """null: a reply stands in the completion as it is, after a stop string. Otherwise it is a message with this role,
    as the chat template renders it, and every turn ends with the end token."""
    max_turns: int = Field(default=8, ge=1)
    """Turns of the policy in an episode. sampling.max_tokens bounds the tokens of all turns together."""

    @property
    def joint(self) -> str:
        """Text between two turns of the policy, as the verifier reads them; messages begin new lines."""
        return "" if self.role is None else "\n"


def active_environment(environment: EnvironmentConfig, task: TaskConfig) -> EnvironmentConfig | None:
    """Return the section with name, stop strings and role of the environment in use; None without an environment."""
    name = environment.fn or _own_environment(task)
    if name is None:
        return None
    role = environment.role or ROLES.get(name)
    stop = environment.stop or (STOP_STRINGS.get(name, ()) if role is None else ())
    return environment.model_copy(update={"fn": name, "stop": stop, "role": role})


def environment_notes(environment: EnvironmentConfig | None) -> list[str]:
    """Return a line for the user about the environment in use."""
    if environment is None:
        return []
    ends = " or ".join(map(repr, environment.stop)) or "the end token"
    place = f", as messages of the role {environment.role}" if environment.role else ""
    return [f"environment {environment.fn}: answers after {ends}{place}, at most {environment.max_turns} turns"]


def _own_environment(task: TaskConfig) -> str | None:
    if isinstance(task, GuessConfig):
        return "guess"
    if isinstance(task, BenchmarkConfig) and task.name == "multi_if":
        return "multi_if"
    return "calculator" if isinstance(task, SumsConfig) and task.tool_share else None
