"""Summary of a run that has not begun: its stages, model, data and processes."""

from __future__ import annotations

from collections.abc import Iterator

from rlsys.config.engine_roles import section_of
from rlsys.config.schema import Config
from rlsys.config.search import SearchConfig
from rlsys.config.stages import DataSource, StagePlan, stage_plans
from rlsys.launch.prepare import Prepared
from rlsys.launch.resources import ResourcePlan

Line = tuple[str, str]


def summary(config: Config, prepared: Prepared, start: str) -> list[Line]:
    """Return labels and texts.

    Args:
        config: the checked config.
        prepared: its checked input.
        start: from which state the run starts.
    """
    lines = [("run", f"{config.run.dir}: {start}")]
    lines += [(plan.name, _stage(config, plan, prepared)) for plan in stage_plans(config)]
    lines.append(("rlsys search", _search(config)))
    lines += _models(config, prepared)
    lines.append(("task", _task(config, prepared)))
    longest = f"prompt and completion up to {config.actors.max_model_len} tokens"
    lines.append(("lengths", f"{longest}, completion up to {config.sampling.max_tokens}"))
    for name, plan in zip(("processes", "rlsys search"), prepared.plans, strict=False):
        lines += [(name, processes(plan)), ("", _needs(plan))]
    return [line for line in lines if line[1]]


def _stage(config: Config, plan: StagePlan, prepared: Prepared) -> str:
    if plan.loop == "search":
        return f"trees of {len(prepared.tree_prompts):,} prompts, and the data in them"
    parts = [_source(source, prepared) for source in plan.data]
    if plan.loop == "online":
        train = config.train
        parts.insert(0, f"{train.groups_per_step} prompts x {train.group_size} completions")
        if config.search.online:
            parts.append(f"{config.search.fraction:.0%} of the prompts searched")
        parts.append(
            f"{train.updates_per_step} optimizer updates" if train.updates_per_step > 1 else "1 optimizer update"
        )
        if train.max_staleness:
            parts.append(f"staleness up to {train.max_staleness}")
    return f"{plan.steps:,} steps, each with {', '.join(parts)}"


def _search(config: Config) -> str:
    """Return what the command of that name would grow; "" if the config is not made for it."""
    if config.search == SearchConfig() or "search" in config.stages:
        return ""
    search, stop = config.search, config.search.stop
    limits = [(stop.simulations, "simulations"), (stop.tokens, "tokens"), (stop.answers, "answers")]
    most = " or ".join(f"{limit:,} {noun}" for limit, noun in limits if limit is not None)
    trees = f"trees of {search.prompts:,} {search.split} prompts, at most {most} each"
    return f"{trees}; the stages are those of `rlsys train`"


def _source(source: DataSource, prepared: Prepared) -> str:
    if source.kind == "demonstrations":
        return f"{source.per_step} demonstrations"
    noun = "rows" if source.kind == "rows" else "pairs"
    if source.extracted:
        return f"{source.per_step} {noun} that the stage search extracts"
    data = prepared.inputs.data
    count = len(data.rows() if source.kind == "rows" else data.pairs())
    field = "sft.path" if source.kind == "rows" else "preference.path"
    return f"{source.per_step} {noun} of {count:,} in {field}"


def _models(config: Config, prepared: Prepared) -> Iterator[Line]:
    policy = prepared.policy
    origin = config.model.path or "from scratch"
    trained = f", {prepared.adapter.parameters:,} of them in a trained adapter" if prepared.adapter else ""
    yield "model", f"{origin}: {policy.parameters:,} parameters{trained}, learner in {config.learner.dtype}"
    for role, model in prepared.models.items():
        if role != "policy":
            yield section_of(role), f"{model.path}: {model.parameters:,} parameters"
    if prepared.held_teacher:
        yield "teacher", f"{prepared.held_teacher.path}: {prepared.held_teacher.parameters:,} parameters"


def _task(config: Config, prepared: Prepared) -> str:
    task = prepared.inputs.task
    train, held_out = task.size("train"), task.size("held_out")
    training = "generated training problems" if train is None else f"{train:,} training problems"
    all_held_out = "" if held_out is None else f" of {held_out:,}"
    samples = config.evaluation.samples
    measured = f"{len(prepared.inputs.held_out):,}{all_held_out} held-out problems, {samples} samples of each"
    return f"{config.task.type}: {training}; the evaluation takes {measured}"


def processes(plan: ResourcePlan) -> str:
    """Return the processes of a plan and their GPUs."""
    auxiliary = [f"{engines.actors.count} of {section_of(engines.role)}" for engines in plan.auxiliary]
    learner = [_counted(plan.ranks, "learner rank")] if plan.ranks else []
    devices = [_counted(plan.gpus, "GPU")] if plan.config.run.device == "cuda" else []
    return ", ".join([_counted(plan.config.actors.count, "actor"), *auxiliary, *learner, *devices])


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _needs(plan: ResourcePlan) -> str:
    """Return what the phases need of this machine."""
    needs = []
    for need in plan.needs:
        name, _, unit = need.resource.partition(", ")
        form = ".3g" if unit else ",.0f"  # GiB, or a count
        amount = f"{need.amount:{form}} of {need.available:{form}} {unit or name}"
        phase = "" if need.phase == "all" else f" for {need.phase}"
        needs.append(f"{name} {amount}" if unit else f"{amount}{phase}")
    return ", ".join(needs)
