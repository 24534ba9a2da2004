"""Compare the config of a run with the config that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsys.config.files import FIXED_FIELDS, fixed_fields, flat_fields, load_config, select_fields
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plan
from rlsys.directory import RunDirectory
from rlsys.errors import ConfigError
from rlsys.types import RunState, StageName

# Fields that decide how a command runs, and nothing about the training steps.
_COMMAND_FIELDS = ("run.dir", "run.resume", "run.address", "run.time_limit")

SHOWN = 8
"""Names of further fields that a message lists."""


def load_run_config(run_dir: Path) -> Config:
    """Return the config that a run began with.

    Raises:
        ConfigError: its config.yaml is missing or not valid.
    """
    try:
        return load_config(RunDirectory(run_dir).config)
    except ConfigError as error:
        raise ConfigError(
            f"run.dir or run.resume: {run_dir} cannot be resumed without its config.yaml: {error.message}; restore it, "
            "or start a new run.dir"
        ) from None


def check_fields(config: Config, before: Config, state: RunState, path: Path) -> None:
    """Raise if a run cannot continue with a config.

    Args:
        before: the config that the run began with.
        state: the run state to continue from.
        path: the file of `before`.
    Raises:
        ConfigError: names the first field that must be equal and differs, and lists the others.
    """
    hint = _further_stages(config, before, path)
    check_equal(fixed_fields(before), fixed_fields(config), f"the run to be resumed ({path})", hint)
    _check_rows_per_step(config, before, state, path)


def _further_stages(config: Config, before: Config, path: Path) -> str:
    """Return how to make the stages that follow those of an earlier run, or "" if they do not follow."""
    done, wanted = before.stages, config.stages
    if not done or len(wanted) <= len(done) or wanted[: len(done)] != done:
        return ""
    policy = RunDirectory(path.parent).exported_policy(done[-1])
    return f" with stages=[{','.join(wanted[len(done) :])}] model={{path: {policy}}}"


def changed_fields(before: Config, now: Config) -> tuple[str, ...]:
    """Return the fields that a resume may change and that differ, each as `name old -> new`."""
    old, new = (flat_fields(config.model_dump(mode="json")) for config in (before, now))
    ignored = select_fields({**old, **new}, [*FIXED_FIELDS, *_COMMAND_FIELDS])
    names = [name for name in differing_names(old, new) if name not in ignored]
    return tuple(f"{name} {_written(old.get(name))} -> {_written(new.get(name))}" for name in names)


def check_equal(before: Mapping[str, Any], now: Mapping[str, Any], where: str, hint: str = "") -> None:
    """Raise if values differ from those recorded before.

    Args:
        before: recorded values by config field.
        now: present values by config field.
        where: the record of the earlier values, for the message.
        hint: how to go on with other stages.
    Raises:
        ConfigError: names the first field that differs, and lists the others.
    """
    names = differing_names(before, now)
    if names:
        name, others = names[0], names[1:]
        more = f", and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        also = f" (also different: {', '.join(others[:SHOWN])}{more})" if others else ""
        raise ConfigError(
            f"{name} differs from {where}: expected {_written(before.get(name))}, found {_written(now.get(name))}; "
            f"set it back, or start another run with run.dir=runs/NEW{hint if name == 'stages' else ''}{also}"
        )


def _written(value: Any) -> str:
    """Return a value as a config has it: null, true and false in the place of Python's names."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def differing_names(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names whose values differ; a missing value counts as None."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def extraction_request(config: Config, prompts: int) -> dict[str, Any]:
    """Return the extraction settings of the stage `search`, without the fields that decide its trees.

    Args:
        prompts: number of prompts to grow trees for.
    """
    return {"prompts": prompts, "extract": config.extract.model_dump(mode="json")}


def _check_rows_per_step(config: Config, earlier: Config, state: RunState, path: Path) -> None:
    """Raise if a started stage would take another number of rows in a step.

    Step n takes the rows from n * count on, so another count would repeat or skip rows.
    """
    stage = config.stages[state.stage]
    if not 0 < state.step < stage_plan(config, stage).steps:
        return
    before, now = (_rows_per_step(each, stage) for each in (earlier, config))
    before = {name: count for name, count in before.items() if name in now}  # a term may be turned off and on
    now = {name: count for name, count in now.items() if name in before}
    check_equal(before, now, f"the run to be resumed ({path}), which is within stage {stage}, at step {state.step}")


def _rows_per_step(config: Config, stage: StageName) -> dict[str, int]:
    """Return how many rows or pairs a step takes from each ordered data source, by config field."""
    return {source.per_step_field: source.per_step for source in stage_plan(config, stage).data}
