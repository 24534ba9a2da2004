"""`rlsys evaluate`: measure a run, checkpoint or model folder on a task, with confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlsys.config.files import load_config
from rlsys.config.schema import Config
from rlsys.control.evaluation import error_rate, evaluate_held_out, solved, unanswered
from rlsys.control.search_evaluation import search_and_sample, show_search, with_search
from rlsys.directory import CheckpointDirectory, RunDirectory
from rlsys.display import print_table
from rlsys.errors import ConfigError
from rlsys.interfaces import Task
from rlsys.models.folder import ModelFolder, is_policy
from rlsys.run.checkpoints import CheckpointStore
from rlsys.search.votes import Candidate, majority
from rlsys.stats import Estimate, mean_over_prompts, pass_at_k
from rlsys.tasks import build_task
from rlsys.tasks.answers.extraction import find_answer
from rlsys.tasks.answers.normalise import normalise
from rlsys.types import Prompt, Trajectory, TrajectoryGroup

# Answers with fewer problems are left out of the macro mean, because their accuracy is uncertain.
MACRO_MINIMUM = 30


@dataclass(frozen=True, slots=True)
class Target:
    """The policy folder to evaluate, and the config that names the task."""

    policy: Path
    config: Config


def find_target(target: str, config_path: str | None, overrides: Sequence[str]) -> Target:
    """Find policy and config of a run directory, a checkpoint, or a model or adapter folder.

    Args:
        target: the path of one of them.
        config_path: a config to use in place of the run's own; required for a model folder outside a run directory.
        overrides: overrides of the config, `section.key=value`.

    Raises:
        ConfigError: the target is none of them, or a model folder without a config.
    """
    path = Path(target).absolute()
    if RunDirectory(path).checkpoints.is_dir():
        checkpoint = CheckpointStore(RunDirectory(path).checkpoints, 1).latest()
        if checkpoint is None:
            raise ConfigError(f"{target}: the run has no checkpoint yet")
        policy, config = CheckpointDirectory(checkpoint).policy, RunDirectory(path).config
    elif CheckpointDirectory(path).policy.is_dir():
        policy, config = CheckpointDirectory(path).policy, RunDirectory(path.parent.parent).config
    elif is_policy(path):
        # The model folder is RUN/stages/online or RUN/checkpoints/step_000080/policy.
        above = (RunDirectory(folder).config for folder in path.parents[1:3])
        policy, config = path, next((file for file in above if file.is_file()), RunDirectory(path).config)
    else:
        raise ConfigError(f"{target}: expected a run directory, a checkpoint or a model folder")
    if config_path is None and not config.is_file():
        raise ConfigError(f"{target}: a model folder outside a run directory needs --config, which names the task")
    return Target(policy, load_config(config_path or config, overrides))


async def evaluate(
    pool: Any, prompts: Sequence[Prompt], config: Config, model: ModelFolder | None = None
) -> dict[str, Any]:
    """Measure a policy on prompts.

    Args:
        model: Its tokenizer reads the samples, for the vote of the majority; None leaves it out.

    Returns:
        All figures as JSON-able values: estimates with intervals, and the accuracy by true answer if the task has one.
    """
    task = build_task(config.task, config.run.seed)
    one_answer, samples = task.one_answer, config.evaluation.samples
    figures: dict[str, Any] = {"problems": len(prompts), "samples": samples}
    greedy, sampled = await evaluate_held_out(pool, prompts, config)
    if greedy:
        figures["greedy"] = _figures(greedy, by_answer=one_answer)
    if sampled:
        figures["sampled"] = _figures(sampled, by_answer=one_answer)
        ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, samples) if k <= samples})
        figures["pass_at_k"] = {str(k): asdict(mean_over_prompts(pass_at_k(solved(sampled), k))) for k in ks}
        if model is not None and samples > 1:
            candidates = [sample_candidates(group, model) for group in sampled]
            figures["majority_at_k"] = {str(k): asdict(majority_accuracy(candidates, k)) for k in ks if k > 1}
    if model is not None:
        for mode, groups in (("greedy", greedy), ("sampled", sampled)):
            if groups:
                figures[mode]["every_step_right"] = every_step_right(task, groups, model)
    if config.evaluation.search_answers:
        figures["search"] = await search_and_sample(pool, prompts, config, task.check_steps)
    if one_answer:
        [(answer, count)] = Counter(prompt.answer for prompt in prompts).most_common(1)
        figures["constant_answer"] = {"answer": answer, "accuracy": count / len(prompts)}
    return figures


def completion_text(trajectory: Trajectory, model: ModelFolder) -> str:
    """Return the text that the verifier judged: that of all generated tokens without the end token."""
    ids = trajectory.token_ids[trajectory.loss_mask].tolist()
    if trajectory.finish_reason == "stop" and ids and ids[-1] in model.end_token_ids:
        ids.pop()
    text: str = model.tokenizer.decode(ids)
    return text


def sample_candidates(group: TrajectoryGroup, model: ModelFolder) -> list[Candidate]:
    """Return the answers of the samples of a prompt. Their value is the mean log-probability of the sample."""
    candidates, tokens = [], 0
    for trajectory in group.trajectories:
        tokens += trajectory.completion_length
        answer = find_answer(completion_text(trajectory, model)) if trajectory.answered else None
        value = float(trajectory.behavior_logprobs.sum()) / max(1, trajectory.completion_length)
        right = trajectory.correct
        key = normalise(answer.text) if answer else None
        candidates.append(Candidate(text=key, right=right, tokens=tokens, value=value))
    return candidates


def every_step_right(task: Task, groups: Sequence[TrajectoryGroup], model: ModelFolder) -> dict[str, int]:
    """Return how many right chains the task can check (`checked`), and how many have every step right (`right`)."""
    verdicts = [
        task.check_steps(group.prompt.question, completion_text(trajectory, model))
        for group in groups
        for trajectory in group.trajectories
        if trajectory.correct
    ]
    checked = [verdict.wrong_node is None for verdict in verdicts if verdict is not None]
    return {"right": sum(checked), "checked": len(checked)}


def majority_accuracy(candidates: Sequence[Sequence[Candidate]], k: int) -> Estimate:
    """Return the share of the problems whose most frequent answer among the first k samples is right."""
    chosen = [majority(drawn[:k]) for drawn in candidates]
    return mean_over_prompts(np.array([[each is not None and each.right] for each in chosen]))


def _figures(groups: Sequence[TrajectoryGroup], *, by_answer: bool) -> dict[str, Any]:
    """Return the figures of one way of sampling.

    The figures `by_problem` are means over the samples of each problem, in order, for paired comparisons of policies.
    """
    right = solved(groups)
    lengths = [t.completion_length for group in groups for t in group.trajectories]
    return {
        "accuracy": asdict(mean_over_prompts(right)),
        "no_answer_rate": asdict(mean_over_prompts(unanswered(groups))),
        "error_rate": error_rate(groups),
        "completion_length": float(np.mean(lengths)),
        **(_by_answer([group.prompt.answer for group in groups], right) if by_answer else {}),
        "by_problem": {
            "accuracy": right.mean(axis=1).tolist(),
            "no_answer_rate": unanswered(groups).mean(axis=1).tolist(),
            "completion_length": [
                float(np.mean([t.completion_length for t in group.trajectories])) for group in groups
            ],
        },
    }


def _by_answer(answers: Sequence[str], right: np.ndarray) -> dict[str, Any]:
    labels = np.array(answers)
    rows = {answer: right[labels == answer] for answer in sorted(set(answers))}
    macro = [float(row.mean()) for row in rows.values() if len(row) >= MACRO_MINIMUM]
    return {
        "accuracy_by_answer": {
            answer: {"problems": len(row), "accuracy": float(row.mean())} for answer, row in rows.items()
        },
        "macro_accuracy": float(np.mean(macro)) if macro else None,
    }


def show(figures: Mapping[str, Any], console: Console) -> None:
    """Print the figures as tables."""
    rows = []
    for mode in ("greedy", "sampled"):
        if mode not in figures:
            continue
        for name in ("accuracy", "no_answer_rate"):
            rows.append(_row(f"{mode} {name.replace('_', ' ')}", figures[mode][name]))
        steps = figures[mode].get("every_step_right", {"checked": 0})
        if steps["checked"]:
            share = f"{steps['right'] / steps['checked']:.3f} of {steps['checked']:,}"
            rows.append((f"{mode} right chains, every step right", share, ""))
        if figures[mode]["error_rate"]:
            rows.append((f"{mode} verifier errors", f"{figures[mode]['error_rate']:.3f}", ""))
    for name, shown in (("pass_at_k", "pass"), ("majority_at_k", "majority")):
        rows += [_row(f"{shown}@{k}", estimate) for k, estimate in figures.get(name, {}).items()]
    if "constant_answer" in figures:
        constant = figures["constant_answer"]
        rows.append((f"always answering {constant['answer'][:20]}", f"{constant['accuracy']:.3f}", ""))
    title = f"{figures['problems']} problems, {figures['samples']} samples each"
    print_table(console, ("figure", "value", "95 % interval"), rows, title=title)
    by_answer: Mapping[str, Any] = next(
        (figures[mode].get("accuracy_by_answer", {}) for mode in ("greedy", "sampled") if mode in figures), {}
    )
    if 1 < len(by_answer) <= 12:
        _show_by_answer(figures, console, list(by_answer))
    if "search" in figures:
        show_search(figures["search"], figures["problems"], console)


def _show_by_answer(figures: Mapping[str, Any], console: Console, answers: Sequence[str]) -> None:
    modes = [mode for mode in ("greedy", "sampled") if mode in figures]
    rows = []
    for answer in answers:
        cells = [figures[mode]["accuracy_by_answer"][answer] for mode in modes]
        rows.append((answer, str(cells[0]["problems"]), *(f"{cell['accuracy']:.3f}" for cell in cells)))
    macro = [figures[mode]["macro_accuracy"] for mode in modes]
    if None not in macro:
        rows.append(("macro", f">= {MACRO_MINIMUM} each", *(f"{value:.3f}" for value in macro)))
    print_table(console, ("answer", "problems", *modes), rows, title="accuracy by true answer")


def _row(name: str, estimate: Mapping[str, float]) -> tuple[str, str, str]:
    value = Estimate(**estimate)
    return name, f"{value.mean:.3f}", f"{value.low:.3f} to {value.high:.3f}"


def run(target: Target) -> dict[str, Any]:
    """Start actors on the target's policy and return its figures."""
    from rlsys.launch import session as launch

    config = with_search(target.config) if target.config.evaluation.search_answers else target.config
    return launch.evaluate_policy(target.policy, config, evaluate)
