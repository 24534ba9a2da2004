"""`rlsys evaluate`: what is evaluated, and how figures are shown."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePool, group, prompt
from rich.console import Console

from rlsys.commands.evaluate import Target, evaluate, find_target, show
from rlsys.commands.evaluate import run as run_evaluation
from rlsys.config.files import dump_config, parse_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.launch import session as launch
from rlsys.run.checkpoints import CheckpointStore
from rlsys.types import Prompt, SamplingSettings, TrajectoryGroup


def config(samples: int = 2, answers: int = 0, task: str = "letter_count") -> Config:
    values = {"run": {"dir": "unused", "seed": 5}, "model": {"path": "unused"}, "task": {"type": task}}
    return parse_config({**values, "evaluation": {"samples": samples, "search_answers": answers}}, "test")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a checkpoint and what a stage handed over."""
    store = CheckpointStore(tmp_path / "checkpoints", 1)
    temporary = store.begin("step_000002")
    for policy in (temporary / "policy", tmp_path / "stages" / "online"):
        policy.mkdir(parents=True)
        (policy / "config.json").write_text("{}")
    store.commit(temporary, "step_000002", {"weight_version": 2})
    (tmp_path / "config.yaml").write_text(dump_config(config()))
    return tmp_path


@pytest.mark.parametrize(
    ("target", "policy"),
    [
        ("", "checkpoints/step_000002/policy"),
        ("checkpoints/step_000002", "checkpoints/step_000002/policy"),
        ("checkpoints/step_000002/policy", "checkpoints/step_000002/policy"),
        ("stages/online", "stages/online"),
    ],
)
def test_every_folder_of_a_run_that_holds_a_policy(run: Path, target: str, policy: str) -> None:
    found = find_target(str(run / target), None, ["evaluation.samples=7"])
    assert found.policy == run / policy
    assert (found.config.run.seed, found.config.evaluation.samples) == (5, 7)


def test_a_folder_elsewhere_needs_a_config(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("model")
    with pytest.raises(ConfigError, match="expected a run directory, a checkpoint or a model folder"):
        find_target(str(elsewhere), None, [])
    (elsewhere / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="needs --config"):
        find_target(str(elsewhere), None, [])
    assert find_target(str(elsewhere), str(run / "config.yaml"), []).policy == elsewhere


class OneError(FakePool):
    """The first sample of prompt p0 gets no verdict."""

    async def generate(self, actor: int, prompts: list[Prompt], settings: SamplingSettings) -> list[TrajectoryGroup]:
        return [self.judge(group(p, 0, [1.0, 0.0][: settings.samples])) for p in prompts]

    def judge(self, found: TrajectoryGroup) -> TrajectoryGroup:
        if found.prompt.prompt_id not in self.failing:
            return found
        bad = replace(found.trajectories[0], outcome="timeout", reward=0.0, answered=False)
        return replace(found, trajectories=(bad, *found.trajectories[1:]))


@pytest.mark.parametrize("failing", [(), ("p0",)])
def test_verifier_errors_are_shown_apart(failing: tuple[str, ...]) -> None:
    prompts = [prompt(f"p{number}") for number in range(5)]
    found = asyncio.run(evaluate(OneError(2, [], failing), prompts, config()))
    # 1 of 5 greedy completions, 1 of 5 * 2 samples.
    assert found["greedy"]["error_rate"] == pytest.approx(0.2 if failing else 0)
    assert found["sampled"]["error_rate"] == pytest.approx(0.1 if failing else 0)
    assert found["greedy"]["accuracy"]["mean"] == pytest.approx(0.8 if failing else 1)
    assert found["greedy"]["no_answer_rate"]["mean"] == 0
    stream = io.StringIO()
    show(found, Console(file=stream, width=100))
    shown = [line for line in stream.getvalue().splitlines() if "verifier errors" in line]
    assert [line.split()[-1] for line in shown] == (["0.200", "0.100"] if failing else [])


def test_figures_by_true_answer_where_a_problem_has_one() -> None:
    # One greedy sample each, right for all: answers 1, 1, 1, 2 and 2.
    prompts = [replace(prompt(f"p{n}"), answer="1" if n < 3 else "2") for n in range(5)]

    def measured(task: str) -> tuple[dict[str, Any], str]:
        found = asyncio.run(evaluate(OneError(2, []), prompts, config(task=task)))
        stream = io.StringIO()
        show(found, Console(file=stream, width=100))
        return found, stream.getvalue()

    found, shown = measured("letter_count")
    assert found["constant_answer"] == {"answer": "1", "accuracy": 0.6}
    by_answer = {"1": {"problems": 3, "accuracy": 1.0}, "2": {"problems": 2, "accuracy": 1.0}}
    assert found["greedy"]["accuracy_by_answer"] == by_answer
    assert found["greedy"]["macro_accuracy"] is None  # fewer than MACRO_MINIMUM of each
    assert "always answering 1" in shown and "accuracy by true answer" in shown
    # Any plan that works is right: the answer of a problem tells nothing.
    plans, shown = measured("blocksworld")
    assert set(found) - set(plans) == {"constant_answer"}
    for mode in ("greedy", "sampled"):
        assert set(found[mode]) - set(plans[mode]) == {"accuracy_by_answer", "macro_accuracy"}
    assert "always answering" not in shown and "true answer" not in shown and "greedy accuracy" in shown


def test_an_evaluation_searches_only_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(_policy: Path, given: Config, measure: object) -> dict[str, object]:
        assert measure is evaluate
        return {"stop": given.search.stop.answers}

    monkeypatch.setattr(launch, "evaluate_policy", measured)
    assert run_evaluation(Target(tmp_path, config())) == {"stop": None}
    assert run_evaluation(Target(tmp_path, config(answers=6))) == {"stop": 6}
