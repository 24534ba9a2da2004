"""The schema of tasks whose problems come from elsewhere: benchmarks, the package reasoning-gym, and plug-ins."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlsys.config.section import PathName, Section
from rlsys.plugins import PluginName
from rlsys.tables.templates import check_template

BenchmarkName = Literal["gsm8k", "math500", "aime24", "aime25", "amc", "olympiad", "minerva", "ifeval", "multi_if"]


class BenchmarkConfig(Section):
    type: Literal["benchmark"] = "benchmark"
    name: BenchmarkName
    """Name of the benchmark. docs/tasks.md has its data set, its columns and its prompt."""
    path: PathName | None = None
    """File, folder or hub id with the held-out problems, in the columns of the benchmark. null: its data set on the
    hub."""
    train_path: PathName | None = None
    """The same with training problems in these columns. null: those of the benchmark on the hub (gsm8k has some), or
    none if `path` is set; without training problems it can only be evaluated."""
    prompt_template: str | None = None
    """Text of the user message, as in the task dataset. null: that of the benchmark."""
    system_prompt: str | None = Field(default=None, min_length=1)
    """System message before every question."""
    accept_cut_off: bool = False
    """Also judge completions that were cut off at sampling.max_tokens. By default they have no answer."""

    @field_validator("prompt_template")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        if template is not None:
            check_template(template)
        return template


class ReasoningGymSet(Section):
    weight: float = Field(default=1.0, gt=0, le=1_000_000)
    """Share of the problems from this data set, relative to the weights of the others."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the data set by name, as its class in reasoning-gym has them; without seed and size."""

    @field_validator("arguments")
    @classmethod
    def _own(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in ("seed", "size"):
            if name in arguments:
                raise ValueError(f"expected no {name}: task.seed, task.size and task.held_out_size set it")
        return arguments


class ReasoningGymConfig(Section):
    type: Literal["reasoning_gym"] = "reasoning_gym"
    datasets: dict[str, ReasoningGymSet] = Field(min_length=1)
    """Data sets of the package reasoning-gym by name, such as `{leg_counting: {}, sudoku: {weight: 2}}`. docs/tasks.md
    lists them."""
    size: int | None = Field(default=None, ge=1)
    """Number of training problems. null: no limit."""
    held_out_size: int = Field(default=200, ge=1)
    """Number of held-out problems. A training problem never has the question of one of them."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the problems of both splits. null: run.seed."""
    prompt_template: str = "{question}\nPut the final answer between <answer> and </answer>."
    """Text of the user message. {question} is replaced by the question."""
    system_prompt: str | None = Field(default=None, min_length=1)
    """System message before every question."""
    max_bad_rows: float = Field(default=0.1, ge=0, le=1)
    """Largest share of problems whose prompts are too long. Other problems are drawn in their place. A larger share is
    an error."""

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, values: Any) -> Any:
        # `sudoku:` alone in YAML is null, and means a data set with its defaults.
        given = values.get("datasets") if isinstance(values, dict) else None
        if isinstance(given, dict):
            values = {**values, "datasets": {name: {} if each is None else each for name, each in given.items()}}
        return values

    @model_validator(mode="after")
    def _template(self) -> ReasoningGymConfig:
        check_template(self.prompt_template)
        return self


class CustomConfig(Section):
    type: Literal["custom"] = "custom"
    fn: PluginName
    """Class or function that makes the task: `file.py:Name`, or `module:Name` (docs/extending.md). It is called with
    `arguments` and `seed`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the call, by name."""
