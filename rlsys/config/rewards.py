"""The schema of the section `rewards`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rlsys.config.section import Section
from rlsys.plugins import PluginName

TASK = "task"
"""Name of the reward of the task beside those of functions."""
ENVIRONMENT = "environment"
"""Name of the sum of the rewards that an environment gives in an episode."""
BUILT_IN = ("format", "length")


class RewardFunctionConfig(Section):
    fn: Literal["format", "length"] | PluginName
    """`module:function`, `file.py:function`, `format` or `length` (docs/rewards.md). It is called as TRL calls reward
    functions, with one completion at a time."""
    weight: float = Field(default=1.0, ge=-1000, le=1000)
    """Factor of its reward in the sum."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in metrics and displays. By default that of the function."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of every call, by name."""

    @property
    def label(self) -> str:
        """Return its name in metrics."""
        return self.name or self.fn.rpartition(":")[2]

    @model_validator(mode="after")
    def _built_in(self) -> RewardFunctionConfig:
        if self.fn == "length":
            start, end = self.arguments.get("start"), self.arguments.get("end")
            if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end):
                raise ValueError("length needs arguments {start: CHARACTERS, end: CHARACTERS} with start below end")
        if self.fn in BUILT_IN:
            known = {"length": {"start", "end"}, "format": {"pattern"}}[self.fn]
            if unknown := sorted(set(self.arguments) - known):
                raise ValueError(f"arguments: {self.fn} has no argument {unknown[0]!r}")
        return self


class RewardsConfig(Section):
    functions: tuple[RewardFunctionConfig, ...] = ()
    """Reward functions, whose weighted rewards are added to that of the task."""
    task_weight: float = Field(default=1.0, ge=0, le=1000)
    """Factor of the task's own reward in the sum, if there are functions. 0: only the functions count; the accuracy
    stays that of the task."""
    workers: int = Field(default=1, ge=1)
    """Number of verifier processes of each actor."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that a verification may take; then its process is killed: outcome `timeout`."""
    memory_mib: int = Field(default=2048, ge=256)
    """Address-space limit of a verifier process, in MiB."""

    @model_validator(mode="after")
    def _names(self) -> RewardsConfig:
        names = [TASK, ENVIRONMENT, *(each.label for each in self.functions)]
        for name in names[2:]:
            if names.count(name) > 1:
                raise ValueError(f"functions: expected different names, found {name!r} twice; set functions.N.name")
        return self
