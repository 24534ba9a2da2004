"""`rlsys evaluate`: measuring, keeping finished parts, and showing the figures."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluations import prompts
from fakes import FakePool, NumberTask, group
from rich.console import Console

from rlsys import cli
from rlsys.commands import evaluate as command
from rlsys.commands.evaluation_targets import NamedTask, Target
from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.errors import AbortedRunError, ConfigError, TooManyFailuresError
from rlsys.launch import session as launch
from rlsys.launch.prepare import Evaluation
from rlsys.types import Prompt, SamplingSettings, TrajectoryGroup


def config(answers: int = 0, **sections: Any) -> Config:
    values = {"run": {"dir": "unused", "seed": 5}, "model": {"path": "unused"}, "task": {"type": "letter_count"}}
    evaluation = {"samples": 2, "search_answers": answers}
    return parse_config({**values, "evaluation": evaluation, **sections}, "test")


class Words:
    """A model whose tokens are words, and 2 the end token."""

    end_token_ids = (2,)
    digest = "base"

    def __init__(self, tokenizer_digest: str = "t") -> None:
        self.tokenizer_digest = tokenizer_digest

    @property
    def tokenizer(self) -> Words:
        return self

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{token}" for token in ids)


class Pool(FakePool):
    """Actors whose greedy samples are right, and of whose two samples the second is wrong."""

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup]:
        self.calls.append(settings.samples)
        return [group(each, 0, [1.0, 0.0][: settings.samples]) for each in prompts]


class Stage:
    """What `rlsys evaluate` starts, without Ray: every policy has a pool of its own.

    Attributes:
        started: the policies whose actors were started, in order.
        calls: the number of samples of each call of an actor.
        broken: called before a mode is sampled.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 3) -> None:
        self.started: list[str] = []
        self.calls: list[int] = []
        self.lines: list[str] = []
        self.tokenizers: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.fail: Callable[[int], None] = lambda _samples: None
        self.count = count
        monkeypatch.setattr(command, "prepare_evaluation", self.prepare)
        monkeypatch.setattr(launch, "evaluate_policy", self.evaluate)
        monkeypatch.setattr(command, "weights_digest", lambda policy: f"weights of {policy.name}")

    def prepare(self, policy: Path, given: Config) -> Any:
        held_out = prompts(self.counts.get(policy.name, self.count))
        inputs = SimpleNamespace(held_out=held_out, task=NumberTask(9))
        prepared = SimpleNamespace(inputs=inputs, notes=["1 row skipped"], models={})
        model: Any = Words(self.tokenizers.get(policy.name, "t"))
        given_prepared: Any = prepared
        return Evaluation(policy=policy, config=given, model=model, prepared=given_prepared, adapted=None)

    def evaluate(self, evaluation: Evaluation, measure: Any) -> None:
        self.started.append(evaluation.policy.name)
        stage = self

        class Failing(Pool):
            async def generate(self, actor: int, prompts: Any, settings: SamplingSettings) -> Any:
                stage.fail(settings.samples)
                return await super().generate(actor, prompts, settings)

        asyncio.run(measure(Failing(1, self.calls), evaluation.prepared.inputs.held_out))

    def run(
        self, folder: Path, names: Sequence[str] = ("a",), tasks: Sequence[NamedTask] = (), output: str | None = None
    ) -> str:
        targets = []
        for name in names:
            (folder / name).mkdir(exist_ok=True)
            targets.append(Target(name, folder / name, None, f"{name}: newest checkpoint"))
        stream = io.StringIO()
        command.run(
            targets,
            tasks or [NamedTask("numbers", config())],
            output=output,
            console=Console(file=stream, width=80),
            say=self.lines.append,
        )
        return stream.getvalue()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_one_model_on_one_task(stage: Stage, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    shown = stage.run(tmp_path, output=str(output))
    figures = json.loads(output.read_text())
    assert figures["model"] == {"name": "a", "weights": "weights of a", "tokenizer": "t"}
    assert (figures["task"], figures["problems"], figures["samples"]) == ("numbers", 3, 2)
    assert (figures["greedy"]["accuracy"]["mean"], figures["sampled"]["accuracy"]["mean"]) == (1, 0.5)
    assert figures["pass_at_k"]["2"]["mean"] == 1 and "comparisons" not in figures
    assert stage.calls == [1, 2]
    assert stage.lines == ["a: newest checkpoint", "1 row skipped", f"starting 2 actors on {tmp_path / 'a'}"]
    assert "numbers: 3 problems, 2 samples each" in shown and "difference" not in shown


def test_models_and_tasks_are_compared_with_the_first_model(stage: Stage, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    tasks = [NamedTask("one", config()), NamedTask("two", config(run={"dir": "unused", "seed": 6}))]
    stage.tokenizers["c"] = "u"
    shown = stage.run(tmp_path, ("a", "b", "c"), tasks, str(output))
    document = json.loads(output.read_text())
    pairs = [(task, name) for task in ("one", "two") for name in ("a", "b", "c")]
    assert [(each["task"], each["model"]["name"]) for each in document["results"]] == pairs
    assert [(each["task"], each["first"], each["second"]) for each in document["comparisons"]] == [
        (task, "a", name) for task, name in pairs if name != "a"
    ]
    assert stage.started == ["a", "b", "c"] * 2
    assert stage.lines.count("1 row skipped") == 1
    assert "A and C have different tokenizers: their texts compare, their tokens do not" in shown.splitlines()
    assert "A and B" not in shown


def test_an_interrupted_evaluation_continues_to_the_same_bytes(stage: Stage, tmp_path: Path) -> None:
    names = ("a", "b")
    stage.run(tmp_path, names, output=str(tmp_path / "whole.json"))

    def stop_at_second_sampling(samples: int) -> None:
        if samples == 2 and stage.calls == [1, 2, 1]:
            raise AbortedRunError("SIGINT")

    stage.calls.clear()
    stage.fail = stop_at_second_sampling
    output = tmp_path / "figures.json"
    with pytest.raises(AbortedRunError, match="^SIGINT; finished parts are kept, the same command continues$"):
        stage.run(tmp_path, names, output=str(output))
    assert not output.exists()
    stage.fail = lambda _samples: None
    stage.started.clear()
    stage.lines.clear()
    stage.run(tmp_path, names, output=str(output))
    assert stage.started == ["b"] and stage.calls == [1, 2, 1, 2]
    assert "a on numbers: greedy, sampled kept from an earlier evaluation" in stage.lines
    assert "b on numbers: greedy kept from an earlier evaluation" in stage.lines
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_part_is_used_again_only_for_the_same_weights_and_settings(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "figures.json")

    def calls(**sections: Any) -> list[int]:
        stage.calls.clear()
        stage.run(tmp_path, tasks=[NamedTask("numbers", config(**sections))], output=output)
        return list(stage.calls)

    assert calls() == [1, 2] and calls() == []
    assert calls(evaluation={"samples": 2, "prompts": 3}) == []  # the problems count, not the number asked for
    assert calls(evaluation={"samples": 4}) == [4]  # greedy completions do not depend on the number of samples
    assert calls(run={"dir": "unused", "seed": 6}) == [1, 2]
    assert calls(sampling={"max_tokens": 9}) == [1, 2]
    assert calls(actors={"dtype": "bf16"}) == [1, 2]
    assert calls(actors={"count": 1}) == []
    monkeypatch.setattr(command, "weights_digest", lambda policy: "others")
    assert calls() == [1, 2]


def test_without_an_output_file_nothing_is_kept_or_promised(stage: Stage, tmp_path: Path) -> None:
    def stop(_samples: int) -> None:
        raise AbortedRunError("SIGINT")

    stage.fail = stop
    with pytest.raises(AbortedRunError, match="^SIGINT$"):
        stage.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_models_that_would_get_other_problems_are_refused_before_anything_starts(stage: Stage, tmp_path: Path) -> None:
    stage.counts["b"] = 2
    with pytest.raises(ConfigError, match="^task numbers: b can take 2 problems and a others .3., because"):
        stage.run(tmp_path, ("a", "b"))
    assert stage.started == []


def test_an_evaluation_without_anything_to_measure_is_refused(stage: Stage, tmp_path: Path) -> None:
    nothing = NamedTask("numbers", config(evaluation={"samples": 0, "greedy": False}))
    with pytest.raises(ConfigError, match="^task numbers: nothing to measure; set evaluation.greedy, "):
        stage.run(tmp_path, tasks=[nothing])


def test_a_checkpoint_that_a_running_training_removed_is_named(stage: Stage, tmp_path: Path) -> None:
    def remove(_samples: int) -> None:
        (tmp_path / "a").rmdir()
        raise TooManyFailuresError("1 of 3 evaluation rollouts failed")

    stage.fail = remove
    with pytest.raises(ConfigError, match="^a: .*was removed meanwhile"):
        stage.run(tmp_path)
    stage.fail = lambda _samples: (_ for _ in ()).throw(TooManyFailuresError("why"))
    with pytest.raises(TooManyFailuresError, match="^why$"):
        stage.run(tmp_path)


def test_an_evaluation_searches_only_if_asked_to(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[int | None] = []

    async def search(_pool: Any, held_out: Any, given: Config, _check: Any) -> dict[str, Any]:
        asked_for.append(given.search.stop.answers)
        return {"answers": len(held_out)}

    monkeypatch.setattr(command, "search_and_sample", search)
    monkeypatch.setattr("rlsys.commands.evaluation_tables.show_search", lambda results, *_: None)
    output = tmp_path / "figures.json"
    for answers in (0, 6, 6):
        stage.run(tmp_path, tasks=[NamedTask("numbers", config(answers))], output=str(output))
    assert asked_for == [6] and json.loads(output.read_text())["search"] == {"answers": 3}
    assert stage.calls == [1, 2]


def test_the_command_line_hands_everything_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sums.yaml").write_text("type: sums")
    given: list[Any] = []
    monkeypatch.setattr(command, "run", lambda targets, tasks, **options: given.append((targets, tasks, options)))
    monkeypatch.setattr(sys, "argv", ["rlsys", "evaluate", str(tmp_path), "run.seed=8", "--plot", "p.png"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "needs --config or --task" in capsys.readouterr().err
    sys.argv += ["--task", str(tmp_path / "sums.yaml"), "--output", "f.json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    [(targets, [task], options)] = given
    assert stopped.value.code == 0 and targets[0].policy == tmp_path
    assert (task.name, task.config.run.seed, options["output"], options["plot"]) == ("sums", 8, "f.json", "p.png")


def test_the_tokens_of_a_sample_are_read_by_the_tokenizer() -> None:
    from fakes import trajectory

    from rlsys.evaluation.records import completion_text

    given = trajectory()  # three tokens of a prompt, then 3 and 4
    assert completion_text(given, Words()) == "w3 w4"
    ended = trajectory(length=3)
    np.testing.assert_array_equal(ended.token_ids[3:], [3, 4, 5])
    words = Words()
    words.end_token_ids = (5,)
    assert completion_text(ended, words) == "w3 w4"
