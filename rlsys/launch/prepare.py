"""The preflight of every command: models, engine roles, resources, tags and data, checked before anything starts.

It imports neither Ray nor vLLM nor torch, so that `rlsys check` stays fast.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.search.build import check_tags
from actors.search.values.judge import answer_tokens
from rlsys.config.engine_roles import (
    ModelEngines,
    Searching,
    assign_search_roles,
    describes_a_search,
    engine_settings,
    given_models,
    searches_in_training,
    section_of,
)
from rlsys.config.environment import active_environment, environment_notes
from rlsys.config.environment_checks import check_searched_turns
from rlsys.config.risks import warnings
from rlsys.config.schema import Config, LoraConfig
from rlsys.config.search_values import ModelValueConfig
from rlsys.config.stages import stage_plans
from rlsys.control.checkpointing import check_best_metric
from rlsys.control.tree_search import find_prompts
from rlsys.data.inputs import Inputs, prepare_model
from rlsys.errors import ConfigError, DamagedFileError
from rlsys.launch.access import check_address, check_answer
from rlsys.launch.devices import missing_devices
from rlsys.launch.resources import ResourcePlan, count_gpus, plan_resources
from rlsys.launch.transports import check_transport
from rlsys.models.adapters import AdapterSpec, check_adapter, read_adapter
from rlsys.models.checks import Use, check_model
from rlsys.models.folder import ModelFolder, given_model, is_adapter
from rlsys.plugins import check_sources, command_folder
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.resume import Start, find_start
from rlsys.run.trackers import check_installed
from rlsys.trees import Role
from rlsys.types import Prompt

Purpose = Literal["train", "check", "evaluate", "search"]
READ_ALWAYS = {"task", "environment", "rewards", "search"}
"""Sections with functions of the user that every command calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The checked input of a command. Nothing is started yet, and at most the initial model is written.

    Attributes:
        config: the config of the processes to start; its section `actors` is that of the model they serve.
        models: all models that the command uses, by role.
        searching: the engines of the search; None if the command does not search.
        inputs: task, tokenizer and the streams made of them.
        tree_prompts: the prompts that the stage `search` grows trees for.
        notes: lines for the user about settings and data.
        adapter: the adapter that is trained; None if all weights are.
        plans: the resource plan; `check` adds that of `rlsys search` if the config names models of the search.
    """

    config: Config
    models: Mapping[Role, ModelFolder]
    searching: Searching | None
    inputs: Inputs
    tree_prompts: Sequence[Prompt]
    notes: Sequence[str]
    plans: Sequence[ResourcePlan]
    adapter: AdapterSpec | None = None
    held_teacher: ModelFolder | None = None

    def fingerprint(self) -> dict[str, str]:
        """Return digests of everything that the run reads, by the config field that names each."""
        teachers = {"teacher.model.path": self.models.get("teacher"), "teacher.in_learner": self.held_teacher}
        return self.inputs.fingerprint() | {name: model.digest for name, model in teachers.items() if model}

    @property
    def policy(self) -> ModelFolder:
        """The initial policy, whose tokenizer all policies share."""
        return self.models["policy"]

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that the learner trains and publishes."""
        return self.adapter.parameters if self.adapter else self.policy.parameters

    @property
    def served(self) -> ModelFolder:
        """The model of the rollout actors."""
        return self.models[self.searching.role if self.searching else "policy"]

    @property
    def auxiliary(self) -> tuple[ModelEngines, ...]:
        """Engines of other models than that of the rollout actors."""
        return self.searching.auxiliary if self.searching else ()


def check_settings(config: Config, purpose: Purpose) -> None:
    """Check the settings that need no model and no data.

    Raises:
        ConfigError: run.address is not safe to use or does not answer; this machine lacks the GPUs of run.device (not
            for `check`: the config may be meant for another machine); run.dir cannot be written, or is relative on a
            cluster; the processes cannot have weight_sync.transport; a file with a function of the user does not exist;
            or a training run does not measure
            checkpoint.best_metric, or has a tracker that is not installed.
    """
    check_address(config.run.address)
    sections = {*Config.model_fields} if purpose in ("train", "check") else READ_ALWAYS
    check_sources(config.model_dump(mode="json", include=sections), command_folder())
    lack = _missing_devices(config, purpose)
    if lack and purpose != "check":
        raise ConfigError(lack)
    if purpose in ("train", "check") and not lack:  # the machine that is meant may have another torch
        check_transport(config)
    check_answer(config.run.address)
    if purpose != "evaluate":
        _check_run_dir(config)
    if purpose in ("train", "check"):
        check_best_metric(config)
        check_installed(config.run.trackers)


def _missing_devices(config: Config, purpose: Purpose) -> str | None:
    """Return what this machine lacks for the processes of a command, before any model is read; see `Prepared.plans`."""
    learner, searches = purpose in ("train", "check"), _searches(config, purpose)
    given = given_models(config)
    roles = [role for role in _needed_roles("train" if learner else purpose, searches) if role in given]
    serving = config
    if purpose == "search" and "model" in roles:
        serving = config.model_copy(update={"actors": engine_settings(config, "model", given["model"])})
    others = [role for role in roles if learner or role != "model"]
    gpus = count_gpus(serving, [given[role] for role in others], config.learner.ranks if learner else 0)
    return missing_devices(config, gpus, learner=learner, others=others)


def _check_run_dir(config: Config) -> None:
    """Raise if the run directory cannot be written, or is relative on a cluster.

    A job of `ray job submit` starts in a folder of Ray's session, which ends with the cluster.
    """
    path = Path(config.run.dir).absolute()
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        kind = "a link to nothing" if not nearest.exists() else "no folder"
        raise ConfigError(
            f"run.dir {config.run.dir}: expected a folder, but {nearest} is {kind}; choose another run.dir"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.dir {config.run.dir}: expected a folder that can be written, but {nearest} cannot; change its "
            "permissions, or choose another run.dir"
        )
    if config.run.address != "local" and not Path(config.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir {config.run.dir}: expected an absolute path on a file system that all nodes share, because "
            f"run.address is {config.run.address}"
        )


def prepare(config: Config, purpose: Purpose, policy: ModelFolder | None = None) -> Prepared:
    """Check the input of a command, in the same order for all commands.

    Args:
        config: the config of the command.
        purpose: the command. `check` makes the checks of `train`, but it writes no model. It also leaves
            `ResourcePlan.check` to the caller, which shows the plans first.
        policy: the policy to evaluate; None for the config's initial model, which is built in run.dir if it is missing.

    Raises:
        ConfigError, DataError: the input cannot be used.
    """
    trains = purpose in ("train", "check")
    policy = policy or prepare_model(config, Path(config.run.dir).absolute(), build=purpose != "check")
    searches = _searches(config, purpose)
    models, engines = _load_models(config, policy, _needed_roles(purpose, searches))
    held_teacher, notes = _held_teacher(config, policy) if trains and config.teacher.in_learner else (None, [])
    notes += _environment_notes(config, searches) + check_models(config, models, trains=trains)
    adapter = check_adapter(policy, config.model.lora) if trains and config.model.lora else None
    notes += [adapter.describe()] if adapter else []
    search_config, _, searcher = assign_search_roles(config, policy.path, engines)
    if trains:  # the actors serve the policy, whatever model grows the trees
        auxiliary = tuple(each for role, each in engines.items() if searches or role == "teacher")
        searching = Searching(auxiliary=auxiliary, grows_trees=searches) if searches or auxiliary else None
    else:
        searching = searcher if searches else None
    serving = search_config if purpose == "search" else config
    trained = adapter.parameters if adapter else None
    plans = [plan_resources(serving, models, searching, learner=trains, trained=trained, held=held_teacher)]
    if purpose != "check":
        plans[0].check()
    elif engines.keys() - {"teacher"}:
        plans.append(plan_resources(search_config, models, searcher, learner=False))
    if searches or (purpose == "check" and describes_a_search(config)):
        readers: dict[Role, ModelFolder] = {r: model for r, model in models.items() if r not in ("teacher", "judge")}
        check_tags(config.search, readers)  # also of the policy, which is trained on the data
    inputs = Inputs(config, policy, training=trains)
    grows_trees = trains and not all(plan.trains for plan in stage_plans(config))
    return Prepared(
        config=serving,
        models=models,
        searching=searching,
        inputs=inputs,
        tree_prompts=find_prompts(config, inputs) if grows_trees else (),
        notes=[*notes, *(warnings(config) if trains else ()), *inputs.notes],
        plans=plans,
        adapter=adapter,
        held_teacher=held_teacher,
    )


def find_checked_start(config: Config, run_dir: Path, store: CheckpointStore) -> Start:
    """Return the start that `find_start` returns. If there is none, name also the first fault of the other input.

    Raises:
        ConfigError: see `find_start` and `prepare`.
        DamagedFileError: see `find_start`.
    """
    try:
        return find_start(config, run_dir, store)
    except DamagedFileError:
        raise
    except ConfigError as conflict:
        try:
            prepare(config, "check")
        except ConfigError as fault:
            raise ConfigError(f"{conflict.message}; and apart from this, {fault.message}") from None
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A policy and a task, checked before anything is started.

    Attributes:
        policy: the model or adapter folder.
        config: the config of the actors and the task.
        model: the folder with the tokenizer; for an adapter, its base model.
        adapted: for an adapter, the folder of its base model and its section `model.lora`.
    """

    policy: Path
    config: Config
    model: ModelFolder
    prepared: Prepared
    adapted: tuple[Path, LoraConfig] | None


def prepare_evaluation(policy: Path, config: Config) -> Evaluation:
    """Check a model or adapter folder and the task of a config.

    Raises:
        ConfigError, DataError: the input cannot be used.
    """
    check_settings(config, "evaluate")
    adapted = read_adapter(policy) if is_adapter(policy) else None
    model = ModelFolder(adapted[0] if adapted else policy)
    prepared = prepare(config, "evaluate", model)
    return Evaluation(policy=policy, config=config, model=model, prepared=prepared, adapted=adapted)


def _environment_notes(config: Config, searches: bool) -> list[str]:
    """Return the notes on the environment in use. ConfigError: the command grows trees, and it does not fit them."""
    if searches:
        check_searched_turns(config)
    return environment_notes(active_environment(config.environment, config.task))


def _held_teacher(config: Config, policy: ModelFolder) -> tuple[ModelFolder, list[str]]:
    """Return the teacher that the learner holds, and notes for the user.

    Raises:
        ConfigError: it cannot be used, has other tokens than the policy, or has fewer of them.
    """
    teacher = given_model(str(config.teacher.in_learner), "teacher.in_learner")
    notes = check_model(
        teacher, Use(longest=config.actors.max_model_len, longest_field="actors.max_model_len", held=True)
    )
    check_same_tokens(policy, teacher, field="teacher.in_learner")
    if (teacher.vocabulary or 0) < (policy.vocabulary or 0):
        raise ConfigError(
            f"teacher.in_learner {teacher.path}: expected at least the {policy.vocabulary} token ids of the policy, "
            f"found {teacher.vocabulary}; choose another teacher, or serve it on engines (teacher.model)"
        )
    return teacher, [*notes]


def check_models(config: Config, models: Mapping[Role, ModelFolder], *, trains: bool) -> list[str]:
    """Refuse model folders that would fail later, and return notes for the user.

    A model from scratch was made by this program and is not checked.

    Args:
        config: the config of the command.
        models: all models of the command, by role.
        trains: whether the command trains the policy.

    Raises:
        ConfigError: see `check_model` and `check_sequence_parallel`.
    """
    notes: list[str] = []
    for role, section in given_models(config).items():
        if role in models:
            use = Use(longest=section.max_model_len, longest_field=f"{section_of(role)}.max_model_len")
            notes += check_model(models[role], use)
    if "teacher" in models:
        check_same_tokens(models["policy"], models["teacher"], config.objective.distill.scored_tokens)
    if "judge" in models:
        assert isinstance(config.search.value, ModelValueConfig)  # noqa: S101 - it is the section of the judge
        answer_tokens(models["judge"], config.search.value)
    if config.model.from_scratch is None or not trains:
        longest, field = config.actors.max_model_len, "actors.max_model_len"
        notes += check_model(models["policy"], Use(longest=longest, longest_field=field, trained=trains))
    if config.model.from_scratch is None and trains and config.learner.sequence_parallel > 1:
        from learners.deepspeed.sequence_check import check_sequence_parallel  # imports torch

        check_sequence_parallel(models["policy"], config.learner.sequence_parallel)
    return notes


def check_same_tokens(
    policy: ModelFolder, teacher: ModelFolder, scored: int | None = None, field: str = "teacher.model.path"
) -> None:
    """Refuse a teacher whose token ids stand for other tokens than those of the policy.

    Chat template and end token may differ, as between a base model and one that was trained to chat.

    Args:
        scored: number of tokens that the teacher scores at every place; None for the sampled token alone.

    Raises:
        ConfigError: the tokenizers differ, or the teacher has fewer tokens.
    """
    if policy.vocabulary_digest != teacher.vocabulary_digest:
        raise ConfigError(
            f"{field} {teacher.path}: expected the tokens of the policy {policy.path}, found a tokenizer with other "
            "ids; objective.distill compares single tokens, so choose a teacher of the same family"
        )
    if scored is not None and teacher.vocabulary is not None and scored > teacher.vocabulary:
        raise ConfigError(
            f"objective.distill.top_k {scored} exceeds the {teacher.vocabulary} tokens of teacher.model.path; lower it"
        )


def _needed_roles(purpose: Purpose, searches: bool) -> tuple[Role, ...]:
    """Return the roles of the models that a command loads in addition to the policy."""
    search: tuple[Role, ...] = ("model", "reviewer", "judge") if searches or purpose == "check" else ()
    return (*search, "teacher") if purpose in ("train", "check") else search


def _searches(config: Config, purpose: Purpose) -> bool:
    """Return whether a command asks its rollout actors for trees."""
    if purpose == "evaluate":
        return config.evaluation.search_answers > 0
    return purpose == "search" or searches_in_training(config)


def _load_models(
    config: Config, policy: ModelFolder, roles: Collection[Role]
) -> tuple[dict[Role, ModelFolder], dict[Role, ModelEngines]]:
    """Return the policy and the given models of some roles, and the engines of the latter.

    Raises:
        ConfigError: see `given_model`; or an engine would need several devices on CPUs.
    """
    models: dict[Role, ModelFolder] = {"policy": policy}
    engines: dict[Role, ModelEngines] = {}
    for role, section in given_models(config).items():
        if role not in roles:
            continue
        models[role] = given_model(section.path, f"{section_of(role)}.path")
        settings = engine_settings(config, role, section)
        engines[role] = ModelEngines(role=role, path=models[role].path, actors=settings)
    return models, engines
