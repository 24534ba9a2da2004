"""`rlsys evaluate`: targets, figures and their tables."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fakes import FakePool, group, prompt, trajectory
from rich.console import Console

from rlsys.commands.evaluate import Target, evaluate, find_target, show
from rlsys.commands.evaluate import run as run_evaluation
from rlsys.config.files import dump_config, parse_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.launch import session as launch
from rlsys.run.checkpoints import CheckpointStore
from rlsys.types import Prompt, SamplingSettings, StepVerdict, TrajectoryGroup


def config(samples: int = 2, answers: int = 0, task: str = "letter_count") -> Config:
    values = {"run": {"dir": "unused", "seed": 5}, "model": {"path": "unused"}, "task": {"type": task}}
    return parse_config({**values, "evaluation": {"samples": samples, "search_answers": answers}}, "test")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a checkpoint and an exported policy."""
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
def test_every_folder_of_a_run_with_a_policy_can_be_evaluated(run: Path, target: str, policy: str) -> None:
    chosen = find_target(str(run / target), None, ["evaluation.samples=7"])
    assert chosen.policy == run / policy
    assert (chosen.config.run.seed, chosen.config.evaluation.samples) == (5, 7)


def test_a_folder_elsewhere_needs_a_config(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("model")
    with pytest.raises(ConfigError, match="expected a run directory, a checkpoint or a model folder"):
        find_target(str(elsewhere), None, [])
    (elsewhere / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="needs --config"):
        find_target(str(elsewhere), None, [])
    assert find_target(str(elsewhere), str(run / "config.yaml"), []).policy == elsewhere


class OneError(FakePool):
    """A pool that gives the first sample of each failing prompt no verdict."""

    async def generate(self, actor: int, prompts: list[Prompt], settings: SamplingSettings) -> list[TrajectoryGroup]:
        return [self.judge(group(p, 0, [1.0, 0.0][: settings.samples])) for p in prompts]

    def judge(self, sampled: TrajectoryGroup) -> TrajectoryGroup:
        if sampled.prompt.prompt_id not in self.failing:
            return sampled
        bad = replace(sampled.trajectories[0], outcome="timeout", reward=0.0, answered=False)
        return replace(sampled, trajectories=(bad, *sampled.trajectories[1:]))


@pytest.mark.parametrize("failing", [(), ("p0",)])
def test_verifier_errors_have_their_own_row(failing: tuple[str, ...]) -> None:
    prompts = [prompt(f"p{number}") for number in range(5)]
    figures = asyncio.run(evaluate(OneError(2, [], failing), prompts, config()))
    # 1 of 5 greedy completions, 1 of 5 * 2 samples.
    assert figures["greedy"]["error_rate"] == pytest.approx(0.2 if failing else 0)
    assert figures["sampled"]["error_rate"] == pytest.approx(0.1 if failing else 0)
    assert figures["greedy"]["accuracy"]["mean"] == pytest.approx(0.8 if failing else 1)
    assert figures["greedy"]["no_answer_rate"]["mean"] == 0
    stream = io.StringIO()
    show(figures, Console(file=stream, width=100))
    shown = [line for line in stream.getvalue().splitlines() if "verifier errors" in line]
    assert [line.split()[-1] for line in shown] == (["0.200", "0.100"] if failing else [])


class Words:
    """A model whose tokens are answers, and 2 the end token."""

    end_token_ids = (2,)

    @property
    def tokenizer(self) -> Words:
        return self

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"<answer>{token - 10}</answer>" for token in ids)


class Answering(FakePool):
    """A pool whose samples give these answers; 0 stands for none. 7 is right."""

    ANSWERS: ClassVar = {"p0": (3, 7, 7, 3), "p1": (7, 3, 0, 3), "p2": (0, 0, 0, 0)}

    async def generate(self, actor: int, prompts: list[Prompt], settings: SamplingSettings) -> list[TrajectoryGroup]:
        return [self.drawn(prompt, self.ANSWERS[prompt.prompt_id][: settings.samples]) for prompt in prompts]

    def drawn(self, prompt: Prompt, answers: Sequence[int]) -> TrajectoryGroup:
        trajectories = [
            replace(
                trajectory(reward=float(answer == 7), outcome="ok" if answer == 7 else "wrong"),
                token_ids=np.array([0, 1, 2, 10 + answer, 2], dtype=np.int32),
                answered=answer > 0,
            )
            for answer in answers
        ]
        return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories))


def test_the_most_frequent_answer_of_the_first_samples() -> None:
    prompts = [prompt(name) for name in Answering.ANSWERS]
    figures = asyncio.run(evaluate(Answering(2, []), prompts, config(samples=4), Words()))
    # Of 2 samples the first answer decides: p1. Of 4, p0 has two of each, of which 3 came first; p1 has 3 twice.
    assert {k: row["mean"] for k, row in figures["majority_at_k"].items()} == {"2": pytest.approx(1 / 3), "4": 0.0}
    stream = io.StringIO()
    show(figures, Console(file=stream, width=100))
    assert [line.split()[1] for line in stream.getvalue().splitlines() if "majority@2" in line] == ["0.333"]
    assert "majority_at_k" not in asyncio.run(evaluate(Answering(2, []), prompts, config(samples=1), Words()))


def test_the_steps_of_right_chains_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the samples are right; the chains of p0 have a wrong step, and nobody can check one of the others."""
    judged = []

    class Steps:
        one_answer = False

        def check_steps(self, question: str, chain: str) -> StepVerdict | None:
            judged.append((question, chain))
            return StepVerdict(wrong_node=0 if question == "p0?" else None) if len(judged) % 4 else None

    monkeypatch.setattr("rlsys.commands.evaluate.build_task", lambda *_: Steps())
    prompts = [replace(prompt(name), question=f"{name}?") for name in Answering.ANSWERS]
    figures = asyncio.run(evaluate(Answering(2, []), prompts, config(samples=4), Words()))
    # Greedy: 7 of p1. Sampled: 7 of p0 twice, and then 7 of p1, the fourth chain, which nobody can check.
    assert judged == [(question, "<answer>7</answer>") for question in ("p1?", "p0?", "p0?", "p1?")]
    assert figures["greedy"]["every_step_right"] == {"right": 1, "checked": 1}
    assert figures["sampled"]["every_step_right"] == {"right": 0, "checked": 2}
    stream = io.StringIO()
    show(figures, Console(file=stream, width=100))
    shown = [line.split()[-3:] for line in stream.getvalue().splitlines() if "every step" in line]
    assert shown == [["1.000", "of", "1"], ["0.000", "of", "2"]]


def test_figures_by_true_answer_of_tasks_with_one_answer() -> None:
    # One greedy sample each, right for all: answers 1, 1, 1, 2 and 2.
    prompts = [replace(prompt(f"p{n}"), answer="1" if n < 3 else "2") for n in range(5)]

    def measured(task: str) -> tuple[dict[str, Any], str]:
        figures = asyncio.run(evaluate(OneError(2, []), prompts, config(task=task)))
        stream = io.StringIO()
        show(figures, Console(file=stream, width=100))
        return figures, stream.getvalue()

    figures, shown = measured("letter_count")
    assert figures["constant_answer"] == {"answer": "1", "accuracy": 0.6}
    by_answer = {"1": {"problems": 3, "accuracy": 1.0}, "2": {"problems": 2, "accuracy": 1.0}}
    assert figures["greedy"]["accuracy_by_answer"] == by_answer
    assert figures["greedy"]["macro_accuracy"] is None  # fewer than MACRO_MINIMUM of each
    assert "always answering 1" in shown and "accuracy by true answer" in shown
    # Any plan that works is right, so there is no accuracy by answer.
    plans, shown = measured("blocksworld")
    assert set(figures) - set(plans) == {"constant_answer"}
    for mode in ("greedy", "sampled"):
        assert set(figures[mode]) - set(plans[mode]) == {"accuracy_by_answer", "macro_accuracy"}
    assert "always answering" not in shown and "true answer" not in shown and "greedy accuracy" in shown


def test_an_evaluation_searches_only_if_asked_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(_policy: Path, given: Config, measure: object) -> dict[str, object]:
        assert measure is evaluate
        return {"stop": given.search.stop.answers}

    monkeypatch.setattr(launch, "evaluate_policy", measured)
    assert run_evaluation(Target(tmp_path, config())) == {"stop": None}
    assert run_evaluation(Target(tmp_path, config(answers=6))) == {"stop": 6}
