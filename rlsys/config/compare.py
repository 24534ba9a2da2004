"""The fields of a config against those that a run was begun with: which must be the same, and which have changed."""

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

# Say how a command is run, not how its steps are made.
_OF_THE_COMMAND = ("run.dir", "run.resume", "run.address", "run.time_limit")


def config_of(run_dir: Path) -> Config:
    """What the run to be resumed was begun with."""
    try:
        return load_config(RunDirectory(run_dir).config)
    except ConfigError as error:
        raise ConfigError(
            f"run.dir or run.resume: {run_dir} cannot be resumed without its config.yaml: {error.message}; restore it, "
            "or start a new run.dir"
        ) from None


def check_fields(config: Config, before: Config, state: RunState, path: Path) -> None:
    """Refuse a config with which a run would not go on as it began.

    Args:
        before: the config of the run, as it stands in `path`. state: where it goes on.
    Raises:
        ConfigError: names the first field that differs and must not, and the others.
    """
    _check_equal(fixed_fields(before), fixed_fields(config), f"the run to be resumed ({path})")
    _check_taken(config, before, state, path)


def changed_fields(before: Config, now: Config) -> tuple[str, ...]:
    """Fields that a resume may change and that differ, each as `name old -> new`."""
    was, found = (flat_fields(config.model_dump(mode="json")) for config in (before, now))
    left_out = select_fields({**was, **found}, [*FIXED_FIELDS, *_OF_THE_COMMAND])
    names = [name for name in {**was, **found} if name not in left_out and was.get(name) != found.get(name)]
    return tuple(f"{name} {was.get(name)} -> {found.get(name)}" for name in names)


def _check_taken(config: Config, earlier: Config, state: RunState, path: Path) -> None:
    """Within a stage step n takes the rows from n * count on: with another count some would come twice, or never."""
    stage = config.stages[state.stage]
    if not 0 < state.step < config.max_steps(stage):
        return
    before, now = (_taken_by_step(each, stage) for each in (earlier, config))
    before = {name: count for name, count in before.items() if name in now}  # a term of online may be turned off and on
    now = {name: count for name, count in now.items() if name in before}
    _check_equal(before, now, f"the run to be resumed ({path}), which is within stage {stage}, at step {state.step}")


def _check_equal(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Name what differs: values by field."""
    names = list({**before, **now})  # another type of task or model has other fields
    different = [name for name in names if before.get(name) != now.get(name)]
    if different:
        name = different[0]
        raise ConfigError(
            f"{name} differs from {where}: expected {before.get(name)}, found {now.get(name)}; "
            "set it back, or start a new run.dir"
            + (f" (also different: {', '.join(different[1:])})" if different[1:] else "")
        )


def _taken_by_step(config: Config, stage: StageName) -> dict[str, int]:
    """Return how many rows or pairs a step takes of each ordered data source, by config field."""
    return {source.per_step_field: source.per_step for source in stage_plan(config, stage).data}


def extraction_request(config: Config, prompts: int) -> dict[str, Any]:
    """Return what the stage `search` is asked for, besides what decides its trees.

    Args:
        prompts: number of prompts to grow trees for.
    """
    return {"prompts": prompts, "extract": config.extract.model_dump(mode="json")}
