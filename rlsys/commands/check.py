"""`rlsys check`: validate a config, its model and its data, and say what a run would do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlsys.commands.check_demonstrations import demonstration_lines, made_up
from rlsys.commands.check_summary import Line, summary
from rlsys.commands.check_trials import first_prompt, first_reply, first_rewards, first_value, first_verdicts
from rlsys.config.engine_roles import describes_a_search
from rlsys.config.environment import active_environment
from rlsys.config.files import dump_config
from rlsys.config.risks import WARNING
from rlsys.config.schema import Config
from rlsys.config.search_values import FunctionValueConfig
from rlsys.config.stages import stage_plans
from rlsys.control.tree_search import demonstration_notes
from rlsys.display import print_lines, standard_output
from rlsys.launch.devices import missing_devices
from rlsys.launch.prepare import Prepared, check_settings, find_checked_start, prepare
from rlsys.run.provenance import check_extraction, check_inputs
from rlsys.run.resume import FIRST_START, checkpoint_store, holds_search, is_complete


def run(config: Config, *, resolved: bool = False) -> None:
    """Print what a run would do, the notes on settings and data, some trials, and the verdict.

    Args:
        config: the config of the run.
        resolved: whether to print the config with all defaults first.

    Raises:
        ConfigError: the input is not usable, this machine is too small, or run.dir holds a run that this config cannot
            continue.
    """
    check_settings(config, "check")
    run_dir = Path(config.run.dir).absolute()
    searched = describes_a_search(config) and holds_search(run_dir)
    start = FIRST_START if searched else find_checked_start(config, run_dir, checkpoint_store(config))
    prepared = prepare(config, "check")
    if start.checkpoint and prepared.policy.path.is_dir():  # `train` builds a model that is missing
        check_inputs(start.checkpoint, prepared.fingerprint())
        check_extraction(config, start.state, start.checkpoint, len(prepared.tree_prompts))
    if resolved:
        _print(dump_config(config))
    begins = "complete; `rlsys train` starts nothing" if is_complete(config, start, run_dir) else start.describe()
    if searched:
        begins = "holds the trees of a search: `rlsys search` continues it; training needs another run.dir"
    _print(*_aligned(summary(config, prepared, begins)))
    warnings = 0
    shown = demonstration_lines(config, prepared)
    for lines in (_notes(config, prepared), shown, [first_prompt(prepared)], _trials(config, prepared)):
        for line in lines:
            warnings += line.startswith(WARNING)
            _print(line)
    for plan in prepared.plans:
        plan.check()
    _print("ok" if not warnings else f"ok, {warnings} warning{'s' if warnings > 1 else ''}")


def _notes(config: Config, prepared: Prepared) -> list[str]:
    """Return the notes of the preflight, warnings last."""
    tags = demonstration_notes(config, prepared.inputs.task) if describes_a_search(config) else []
    plan = max(prepared.plans, key=lambda plan: plan.gpus)
    others = [engines.role for engines in plan.auxiliary]
    lack = missing_devices(config, plan.gpus, learner=plan.ranks > 0, others=others)
    devices = [f"{WARNING}{lack}"] if lack else []
    return sorted(
        [*prepared.notes, *_few_problems(config, prepared), *tags, *devices], key=lambda note: note.startswith(WARNING)
    )


def _few_problems(config: Config, prepared: Prepared) -> list[str]:
    """Return a note if an online step takes more prompts than there are training problems."""
    count, size = config.train.groups_per_step, prepared.inputs.task.size("train")
    if size is None or size >= count or not any(plan.loop == "online" for plan in stage_plans(config)):
        return []
    return [
        f"train.groups_per_step {count} exceeds the number of training problems, {size}: a step has some of them more "
        "than once; add problems, or lower it"
    ]


def _trials(config: Config, prepared: Prepared) -> Iterator[str]:
    """Try the functions that the config names, and yield what they gave."""
    if config.objective.custom.fn or ":" in config.objective.policy.estimator:
        from learners.plugins import check_plugins  # it loads torch

        check_plugins(config.objective)
    if config.rewards.functions:
        yield first_rewards(config, prepared)
    elif config.task.type == "custom":
        yield from first_verdicts(config, prepared)
    if isinstance(config.search.value, FunctionValueConfig):
        yield first_value(config, config.search.value, prepared)
    if environment := active_environment(config.environment, config.task):
        yield from made_up(environment, prepared)
        yield from first_reply(config, environment, prepared)


def _aligned(lines: list[Line]) -> list[str]:
    width = max(len(label) for label, _ in lines)
    return [f"{label:<{width}}  {text}" for label, text in lines]


def _print(*lines: str) -> None:
    print_lines(standard_output(), lines)
