"""What a user can get wrong ends with one line that names the field, and exit code 2, before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import REPOSITORY, TINY, FinishedRun, write_config

from rlsys.checkpoint import CheckpointStore
from rlsys.config_file import load_config
from rlsys.resume import find_start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


OVERRIDES = [
    ("train.max_step=5", "train.max_step: unknown key"),
    ("trains.max_steps=5", "trains: unknown key"),
    ("train.max_steps=many", "train.max_steps: Input should be a valid integer"),
    ("train.max_steps=0", "train.max_steps: Input should be greater than or equal to 1, found 0"),
    ("learner.zero_stage=4", "learner.zero_stage: "),
    ("objective.loss_aggregation=mean", "objective.loss_aggregation: "),
    ("sampling.max_tokens=128", "sampling.max_tokens 128 leaves no room for a prompt in actors.max_model_len 128"),
    ("stages=[online, online]", "stages names a stage twice"),
    ("train.max_steps", "expected section.key=value"),
    ("model={path: /nowhere/model}", "model.path /nowhere/model: "),
    ("model={path: not-there/at-all}", "model.path not-there/at-all: "),
    ("model.path=x", "give exactly one of model.path and model.from_scratch"),
    ("actors.threads=1000", "actors.count or actors.threads: the rollout phase needs 2000 threads"),
    ("learner.threads=1000", "learner.ranks or learner.threads: the learning phase needs 2000 threads"),
    ("actors.kv_cache_gib=100000", "actors.count, actors.kv_cache_gib or learner.ranks: "),
    ("run.resume=/nowhere/step_000001", "run.resume: "),
    ("task={type: dataset, path: /nowhere/data.jsonl}", "task.path /nowhere/data.jsonl: no such file"),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_bad_override(refused, tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refused("train", write_config(tmp_path, TINY), override)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


FILES = [
    ("run: {dir: a}\nrun: {dir: b}\n", ":2: duplicate key 'run'"),
    ("run: [a\n", "config.yaml:2: "),
    ("just text\n", "expected a mapping of sections, found str"),
    ("run: {dir: a}\nmodel: {path: x}\n", "task: Field required"),
    ("run: {dir: a}\nmodel: {path: x}\ntask: {type: sums}\n", "task: "),
]


@pytest.mark.parametrize(("text", "expected"), FILES, ids=[text[:24] for text, _ in FILES])
def test_bad_file(refused, tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert expected in refused("check", str(path))
    assert "no-such-file.yaml: cannot be read" in refused("check", str(tmp_path / "no-such-file.yaml"))


GOOD = {"question": "1+1?", "answer": "2", "solution": "<answer>2</answer>"}
ROWS: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("column", [GOOD] * 20, {"question_column": "problem"}, "task.question_column"),
    ("empty", [], {}, "expected at least one row, found none"),
    ("unreadable", [GOOD] * 10 + ["no object"] * 10, {}, "10 of 20"),
    ("long_prompt", [GOOD] * 11 + [{**GOOD, "question": "1" * 500}], {}, "actors.max_model_len minus"),
    ("no_demonstrations", [GOOD, {**GOOD, "question": "2+0?"}] * 10, {}, "task.demonstration_column"),
    (
        "long_demonstration",
        [{**GOOD, "question": f"{i}?", "solution": "1" * 500} for i in range(20)],
        {"demonstration_column": "solution"},
        "tokens, actors.max_model_len is 128",
    ),
]


@pytest.mark.parametrize(("rows", "task", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_data_set(refused, tmp_path: Path, rows: list[Any], task: dict[str, Any], expected: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(tmp_path, {**TINY, "task": {"type": "dataset", "path": str(path), **task}})
    assert expected in refused("train", config)


FIXED = [
    ("run.seed=4", "run.seed differs"),
    ("task.max_length=5", "task.max_length differs"),
    ("model.from_scratch.layers=3", "model.from_scratch.layers differs"),
    ("stages=[online]", "stages differs"),
]


@pytest.mark.parametrize(("override", "expected"), FIXED, ids=[override for override, _ in FIXED])
def test_resume_that_changes_a_fixed_field(refused, finished_run: FinishedRun, override: str, expected: str) -> None:
    before = (finished_run.dir / "config.yaml").read_text()
    message = refused("train", finished_run.config, override)
    assert expected in message and "expected" in message and "found" in message
    assert (finished_run.dir / "config.yaml").read_text() == before


def test_refused_resume_leaves_the_config_of_the_run(refused, finished_run: FinishedRun) -> None:
    before = (finished_run.dir / "config.yaml").read_text()
    assert "needs 2000 threads" in refused("train", finished_run.config, "actors.threads=1000", "train.max_steps=99")
    assert (finished_run.dir / "config.yaml").read_text() == before


def test_used_directory_is_refused_when_resume_is_never(refused, finished_run: FinishedRun) -> None:
    assert "choose another run.dir" in refused("train", finished_run.config, "run.resume=never")


def test_raising_max_steps_is_allowed(finished_run: FinishedRun) -> None:
    config = load_config(finished_run.config, ["train.max_steps=20"])
    start = find_start(config, finished_run.dir, CheckpointStore(finished_run.dir / "checkpoints", 2))
    assert (start.state.stage, start.state.step, start.state.weight_version) == (1, 10, 70)


def test_check_prints_a_config_that_can_be_read_again(tmp_path: Path) -> None:
    config = write_config(tmp_path, TINY)
    done = _command("check", config, "train.max_steps=7")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout.partition("resource plan")[0].rstrip().rpartition("\n")[0]
    (tmp_path / "resolved.yaml").write_text(text)
    assert load_config(tmp_path / "resolved.yaml") == load_config(config, ["train.max_steps=7"])
    assert yaml.safe_load(text)["train"]["max_steps"] == 7
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_step=5", "train.max_step: unknown key"),
        ("actors.kv_cache_gib=100000", "actors.count, actors.kv_cache_gib or learner.ranks: "),  # builds the model
    ],
)
def test_a_real_process_says_one_line_and_exits_with_2(tmp_path: Path, override: str, expected: str) -> None:
    done = _command("train", write_config(tmp_path, TINY), override)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and expected in done.stderr


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlsys.cli", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
