"""`rlsys evaluate`: measure models on tasks, with confidence intervals, and compare them by problem."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsys.commands.evaluation_tables import show
from rlsys.commands.evaluation_targets import NamedTask, Target
from rlsys.config.environment import active_environment
from rlsys.config.schema import Config
from rlsys.control.evaluation import mode_settings, sample_groups
from rlsys.control.search_evaluation import search_and_sample, with_search
from rlsys.errors import AbortedRunError, ConfigError
from rlsys.evaluation.comparison import compare
from rlsys.evaluation.document import is_document
from rlsys.evaluation.figures import result_figures
from rlsys.evaluation.parts import Parts, code_digest
from rlsys.evaluation.plot import AUTHOR, check_plot
from rlsys.evaluation.plot import plot as draw
from rlsys.evaluation.records import Sample, problems_digest, samples_of
from rlsys.files import write_json
from rlsys.launch.prepare import Evaluation, prepare_evaluation
from rlsys.models.folder import ModelFolder, weights_digest
from rlsys.outputs import check_file
from rlsys.plugins import command_folder, plugin_digests
from rlsys.types import Prompt

KEPT = "; finished parts are kept, the same command continues"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pair:
    """One model on one task, checked."""

    target: Target
    task: NamedTask
    evaluation: Evaluation

    @property
    def prompts(self) -> list[Prompt]:
        """The held-out prompts."""
        return self.evaluation.prepared.inputs.held_out


def prepare(targets: Sequence[Target], tasks: Sequence[NamedTask], say: Say) -> list[Pair]:
    """Check every model with every task before anything is started, and print the notes about them.

    Raises:
        ConfigError, DataError: a model or a task cannot be used, or the models would get different problems.
    """
    for task in tasks:
        if not mode_settings(task.config) and not task.config.evaluation.search_answers:
            raise ConfigError(
                f"task {task.name}: nothing to measure; set evaluation.greedy, evaluation.samples or "
                "evaluation.search_answers"
            )
    pairs = [
        Pair(target, task, prepare_evaluation(target.policy, _searching(task.config)))
        for task in tasks
        for target in targets
    ]
    notes = [target.note for target in targets if target.note]
    notes += [note for pair in pairs for note in pair.evaluation.prepared.notes]
    for note in dict.fromkeys(notes):
        say(note)
    for task in tasks:
        first, *others = (pair for pair in pairs if pair.task is task)
        for other in others:
            if problems_digest(other.prompts) != problems_digest(first.prompts):
                raise ConfigError(
                    f"task {task.name}: {other.target.name} can take {len(other.prompts)} problems and "
                    f"{first.target.name} others ({len(first.prompts)}), because prompts that are too long are left "
                    "out; raise actors.max_model_len, so that both get the same problems"
                )
    return pairs


def _searching(config: Config) -> Config:
    return with_search(config) if config.evaluation.search_answers else config


def run(
    targets: Sequence[Target],
    tasks: Sequence[NamedTask],
    *,
    output: str | None = None,
    plot: str | None = None,
    overwrite: bool = False,
    console: Console,
    say: Say,
) -> None:
    """Measure every model on every task, show the figures, and write them.

    Args:
        output: the JSON file to write; finished parts are kept beside it. None writes none and keeps none.
        plot: the image file to draw; None for none.
        overwrite: whether these may be files that `rlsys evaluate` did not write.
        console: gets the tables.
        say: gets lines about the progress.
    """
    if plot:
        check_plot(plot)
        check_file(Path(plot), "--plot", overwrite=overwrite, own=lambda content: AUTHOR.encode() in content)
    if output:
        check_file(Path(output), "--output", overwrite=overwrite, own=is_document)
    parts = Parts.beside(output)
    with _naming_removed_policies(targets):
        document = measure_all(prepare(targets, tasks, say), parts, say)
    if output:
        write_json(Path(output), document)
    if plot:
        draw(document, plot)
    show(document, console)


@contextlib.contextmanager
def _naming_removed_policies(targets: Sequence[Target]) -> Iterator[None]:
    """Turn any failure into the reason for it, if the run that wrote a policy has removed it meanwhile."""
    try:
        yield
    except Exception as error:
        removed = next((target for target in targets if not target.policy.exists()), None)
        if removed is None or isinstance(error, AbortedRunError):
            raise
        raise ConfigError(
            f"{removed.name}: {removed.policy} was removed meanwhile, as a run keeps only its newest checkpoints "
            "(checkpoint.keep_last); evaluate again, or make an empty file NAME.pinned beside the checkpoint"
        ) from error


def measure_all(pairs: Sequence[Pair], parts: Parts, say: Say) -> dict[str, Any]:
    """Measure every model on every task, and compare the models with the first.

    Returns:
        The content of the output file: the result itself for one model and one task, and otherwise `results`, by task
        and model, with `comparisons`.
    """
    results = []
    code = code_digest()
    weights = {policy: weights_digest(policy) for policy in dict.fromkeys(pair.target.policy for pair in pairs)}
    for pair in pairs:
        origin = _origin(pair, weights[pair.target.policy], code)
        results.append(_result(pair, origin, _contents(pair, parts, origin, say)))
    if len(results) == 1:
        return results[0]
    firsts = {result["task"]: result for result in reversed(results)}
    others = [result for result in results if result is not firsts[result["task"]]]
    comparisons = [compare(firsts[result["task"]], result) for result in others]
    return {"results": results, "comparisons": comparisons}


def _result(pair: Pair, origin: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    model = {"name": pair.target.name, "weights": origin["weights"], "tokenizer": origin["tokenizer"]}
    rows = {mode: _rows(content[mode]) for mode in mode_settings(pair.task.config)}
    task = pair.evaluation.prepared.inputs.task
    figures = result_figures(task, pair.prompts, rows, content.get("search"))
    return {"model": model, "task": pair.task.name, **figures}


def _rows(content: Iterable[Iterable[Mapping[str, Any]]]) -> list[list[Sample]]:
    return [[Sample(**sample) for sample in row] for row in content]


def _contents(pair: Pair, parts: Parts, origin: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Return the content of all parts of a pair, and make those that are missing."""
    from rlsys.launch import session as launch  # imports Ray

    config = pair.evaluation.config
    origins = {mode: {**origin, "mode": asdict(settings)} for mode, settings in mode_settings(config).items()}
    if config.evaluation.search_answers:
        origins["search"] = {**origin, "mode": _search_origin(pair)}
    contents = {mode: parts.read(mode, origins[mode]) for mode in origins}
    missing = [mode for mode, content in contents.items() if content is None]
    kept = [mode for mode in contents if mode not in missing]
    where = f"{pair.target.name} on {pair.task.name}"
    if kept:
        say(f"{where}: {', '.join(kept)} kept from an earlier evaluation")
    if not missing:
        return contents

    async def measure(pool: Any, prompts: Sequence[Prompt]) -> None:
        for mode in missing:
            content = await measure_mode(pool, prompts, config, pair.evaluation, mode)
            contents[mode] = parts.write(mode, origins[mode], content)

    say(f"starting {config.actors.count} actors on {pair.evaluation.policy}")
    try:
        launch.evaluate_policy(pair.evaluation, measure)
    except AbortedRunError as error:
        raise AbortedRunError(error.message + (KEPT if parts.folder else "")) from None
    return contents


async def measure_mode(pool: Any, prompts: Sequence[Prompt], config: Config, evaluation: Evaluation, mode: str) -> Any:
    """Return the content of one part: judged samples of every problem, or the comparison of search and samples.

    Raises:
        TooManyFailuresError: see `sample_groups` and `search_and_sample`.
    """
    if mode == "search":
        return await search_and_sample(pool, prompts, config, evaluation.prepared.inputs.task.check_steps)
    groups = await sample_groups(pool, prompts, mode_settings(config)[mode], config.train.max_verifier_failures)
    environment = active_environment(config.environment, config.task)
    joint = environment.joint if environment else ""
    return [[asdict(sample) for sample in samples_of(group, evaluation.model, joint)] for group in groups]


def _origin(pair: Pair, weights: str, code: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that decides all parts of a pair; see `Parts`."""
    config, evaluation = pair.evaluation.config, pair.evaluation
    base = {"base": evaluation.model.digest} if evaluation.adapted else {}
    return {
        "weights": weights,
        **base,
        "tokenizer": evaluation.model.tokenizer_digest,
        "problems": problems_digest(pair.prompts),
        "prompts": [prompt.prompt_id for prompt in pair.prompts],
        "task": config.task.model_dump(mode="json"),
        "seed": config.run.seed,
        "device": config.run.device,
        "actors": config.actors.model_dump(
            mode="json", include={"dtype", "tensor_parallel_size", "threads", "max_model_len", "enforce_eager"}
        ),
        "rewards": config.rewards.model_dump(mode="json", exclude={"workers"}),
        "environment": config.environment.model_dump(mode="json"),
        "data": evaluation.prepared.inputs.task.digest(),
        "plug-ins": plugin_digests(config.model_dump(mode="json"), command_folder()),
        "code": dict(code),
    }


def _search_origin(pair: Pair) -> dict[str, Any]:
    config = pair.evaluation.config
    models: Mapping[Any, ModelFolder] = pair.evaluation.prepared.models
    return {
        "search": config.search.model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json"),
        "answers": config.evaluation.search_answers,
        "models": {str(role): model.digest for role, model in sorted(models.items())},
    }
