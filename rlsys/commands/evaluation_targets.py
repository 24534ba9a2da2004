"""The models and tasks that `rlsys evaluate` is asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config.files import apply_override, load_config, parse_config, read_sections
from rlsys.config.schema import Config
from rlsys.directory import CheckpointDirectory, RunDirectory
from rlsys.earlier_runs import is_local
from rlsys.errors import ConfigError
from rlsys.evaluation.records import problems_digest
from rlsys.models.folder import given_model, is_policy
from rlsys.run.manifest import MANIFEST, verify_chosen
from rlsys.run.policies import locate_policy
from rlsys.tables.files import file_kind
from rlsys.tasks import build_task

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*=")
TASK_SECTIONS = ("task", "environment", "sampling", "evaluation", "search", "rewards", "actors")
"""Sections of a task file that replace those of the config."""


@dataclass(frozen=True, slots=True)
class Target:
    """A policy to evaluate.

    Attributes:
        name: the argument that names it.
        policy: the model or adapter folder.
        config: the config of its run; None outside a run directory.
        note: a line for the user; "" for none.
    """

    name: str
    policy: Path
    config: Path | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class NamedTask:
    """A task by its name, and the config of its evaluation."""

    name: str
    config: Config


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of the command into names of models and overrides of the config.

    Raises:
        ConfigError: no model is named, or one is named twice.
    """
    overrides = [each for each in arguments if OVERRIDE.match(each) and not Path(each).exists()]
    models = [each.rstrip("/") or "/" for each in arguments if each not in overrides]
    if not models:
        raise ConfigError("expected a run directory, a checkpoint, a model folder or a hub id, found only overrides")
    for name, count in Counter(models).items():
        if count > 1:
            raise ConfigError(f"{name} is given {count} times; name every model once")
    return models, overrides


def find_target(name: str) -> Target:
    """Find the policy of a run directory, a checkpoint, a model or adapter folder, or a hub id.

    Which policy a run directory stands for is decided in `rlsys.run.policies`.

    Raises:
        ConfigError: the name is none of them.
        DamagedFileError: the checkpoint is damaged, or has a format of another version of rlsys.
    """
    path = Path(name).absolute()
    if RunDirectory(path).config.is_file() and not is_policy(path):
        place = locate_policy(name)
        return Target(name, place.folder, RunDirectory(place.run_dir).config, place.note)
    if CheckpointDirectory(path).policy.is_dir():
        if (path / MANIFEST).exists():
            verify_chosen(path, [CheckpointDirectory(path).policy.name])
        file = RunDirectory(path.parent.parent).config
        return Target(name, CheckpointDirectory(path).policy, file if file.is_file() else None)
    if is_policy(path):
        # The model folder is RUN/stages/online or RUN/checkpoints/step_000080/policy.
        above = (RunDirectory(folder).config for folder in (*path.parents[1:3], path))
        return Target(name, path, next((file for file in above if file.is_file()), None))
    if path.exists() and not (path / "snapshots").is_dir():  # which the folder of a model in the hub's cache has
        raise ConfigError(
            f"{name}: expected a run directory, a checkpoint or a model folder, found neither config.yaml nor "
            "policy/ nor config.json"
        )
    return Target(name, given_model(name, "model").path, None)


def find_tasks(
    targets: Sequence[Target], config_path: str | None, task_files: Sequence[str], overrides: Sequence[str]
) -> list[NamedTask]:
    """Return the task of the config and those of the task files.

    Args:
        targets: the models. Without `config_path`, the config is that of the first model with one.
        config_path: a config to use in place of the runs' own.
        task_files: YAML files with a section `task`, or with sections of a config, which replace those of the config.
        overrides: overrides of every config, `section.key=value`.

    Raises:
        ConfigError: no task is named, two tasks have one name, or the runs have different problems.
    """
    base = Path(config_path) if config_path else next((each.config for each in targets if each.config), None)
    if base is None and not task_files:
        raise ConfigError(
            f"{targets[0].name}: a model outside a run directory needs --config or --task, which name the task"
        )
    tasks = []
    if base is not None:
        config = load_config(base, overrides)
        tasks.append(NamedTask(_task_name(config), config))
        if config_path is None:
            _check_relative_paths(config, base, overrides)
            _check_same_problems(targets, base, config, overrides)
    tasks += [_task_of_file(file, base, targets[0], overrides) for file in task_files]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise ConfigError(f"{count} tasks are named {name}; give each --task file a name of its own")
    return tasks


def _task_name(config: Config) -> str:
    return config.task.name if config.task.type == "benchmark" else config.task.type


def _task_of_file(file: str, base: Path | None, target: Target, overrides: Sequence[str]) -> NamedTask:
    given = read_sections(file)
    if "type" in given:
        given = {"task": given}
    if "task" not in given:
        raise ConfigError(f"--task {file}: expected a section task, or its keys, found {', '.join(map(str, given))}")
    values: dict[str, Any] = {"run": {"dir": "."}, "stages": ["online"], "model": {"path": str(target.policy)}}
    values = read_sections(base) if base else values
    if unknown := sorted(set(given) - set(Config.model_fields)):
        raise ConfigError(
            f"--task {file}: {unknown[0]}: no such section; a task file has {', '.join(TASK_SECTIONS)} and run.seed"
        )
    values.pop("environment", None)  # it belongs to the other task
    values |= {name: given[name] for name in TASK_SECTIONS if name in given}
    run = given.get("run")
    if isinstance(run, Mapping) and "seed" in run:
        values["run"] = {**values["run"], "seed": run["seed"]}
    for override in overrides:
        apply_override(values, override)
    return NamedTask(Path(file).stem, parse_config(values, f"--task {file}"))


def _check_relative_paths(config: Config, file: Path, overrides: Sequence[str]) -> None:
    """Raise if a relative path in the config of a run leads to no file in the current folder.

    Args:
        config: the config with its overrides.
        file: the run's config.yaml.
        overrides: the overrides, whose paths are not those of the file.
    """
    given = [override.partition("=")[0].strip() for override in overrides]
    functions = [f"rewards.functions.{number}.fn" for number, _ in enumerate(config.rewards.functions)]
    names = {f"task.{key}": value for key, value in config.task if key.endswith("path") and isinstance(value, str)}
    named = {"task.fn": getattr(config.task, "fn", None), "environment.fn": config.environment.fn}
    named |= dict(zip(functions, (each.fn for each in config.rewards.functions), strict=True))
    names |= {key: name.partition(":")[0] for key, name in named.items() if name and ".py:" in name}
    for key, name in names.items():
        is_file = name.endswith(".py") or is_local(name) or file_kind(Path(name)) is not None
        is_override = any(f"{key}.".startswith(f"{each}.") for each in given)
        if is_override or not is_file or name[0] in "/~$" or Path(name).exists():
            continue
        remedy = "rewards.functions=[...] with absolute paths" if key in functions else f"{key}=/absolute/path"
        raise ConfigError(
            f"{key} {name} in {file}: no such file in the current folder {Path.cwd()}; a relative path is looked up in "
            f"the folder of the command: start it in the folder of the run's first command, or give {remedy}"
        )


def _check_same_problems(targets: Sequence[Target], base: Path, config: Config, overrides: Sequence[str]) -> None:
    """Raise if the runs of the models have other held-out problems by their own configs."""
    digest = None
    for target in targets:
        if target.config is None or target.config == base:
            continue
        own = load_config(target.config, overrides)
        if (own.task, own.run.seed) == (config.task, config.run.seed):
            continue
        _check_relative_paths(own, target.config, overrides)
        digest = digest or _held_out_digest(config, config)
        if _held_out_digest(own, config) != digest:
            raise ConfigError(
                f"{target.name}: its run has other held-out problems than {base}; name the config for all models by "
                "--config, or the task by --config and --task"
            )


def _held_out_digest(own: Config, config: Config) -> str:
    task, count = build_task(own.task, own.run.seed), config.evaluation.prompts
    size = task.size("held_out")
    return problems_digest([task.problem("held_out", n) for n in range(count if size is None else min(size, count))])
