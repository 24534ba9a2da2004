"""What a user can get wrong ends with one line that names the field, and exit code 2, before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import REPOSITORY, TINY, FinishedRun, write_config

from rlsys import cli
from rlsys.config.files import load_config
from rlsys.config.schema import FromScratchConfig
from rlsys.errors import ConfigError
from rlsys.launch import session as launch
from rlsys.models.scratch import build_from_scratch
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.lock import RunLock
from rlsys.run.resume import find_start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after all checks is the start of Ray."""

    def ray_cluster(*_: Any) -> None:
        raise ConfigError("everything was accepted")

    monkeypatch.setattr(launch, "ray_cluster", ray_cluster)


@pytest.fixture
def accepted(
    quiet_transformers: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command in this process that ends well; what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlsys", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output, errors = capfd.readouterr()
        assert stopped.value.code == 0, errors
        return output

    return run


OVERRIDES = [
    ("train.max_step=5", "train.max_step: unknown key"),
    ("trains.max_steps=5", "trains: unknown key"),
    ("train.max_steps=many", "train.max_steps: expected a whole number, found 'many'"),
    ("train.max_steps=0", "train.max_steps: expected at least 1, found 0"),
    ("learner.zero_stage=4", "learner.zero_stage: "),
    ("learner.sequence_parallel=3", "learner.ranks 2 must be a multiple of learner.sequence_parallel 3"),
    ("objective.loss_aggregation=mean", "objective.loss_aggregation: "),
    ("sampling.max_tokens=128", "sampling.max_tokens 128 leaves no room for a prompt in actors.max_model_len 128"),
    ("stages=[online, online]", "on the command line: stages: expected each stage once, found online 2 times"),
    ("train.max_steps", "expected section.key=value"),
    ("model={path: /nowhere/model}", "model.path /nowhere/model: "),
    ("model={path: not-there/at-all}", "model.path not-there/at-all: "),
    ("model.path=x", "give exactly one of model.path and model.from_scratch"),
    ("actors.threads=1000", "actors.count or actors.threads: the rollout phase needs 2,000 threads"),
    ("learner.threads=1000", "learner.ranks or learner.threads: the learning phase needs 2,000 threads"),
    ("actors.kv_cache_gib=100000", "actors.count, actors.kv_cache_gib or learner.ranks: "),
    ("run.resume=/nowhere/step_000001", "run.resume /nowhere/step_000001: expected auto, never or the folder of a "),
    ("task={type: dataset, path: /nowhere/data.jsonl}", "task.path /nowhere/data.jsonl: no such file"),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_bad_override(refused, tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refused("train", write_config(tmp_path, TINY), override)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


FILES = [
    ("run: {dir: a}\nrun: {dir: b}\n", ":2: duplicate key 'run'"),
    ("run: [a\n", "config.yaml:2: "),
    ("just text\n", "expected a mapping of sections, found a text"),
    ("run: {dir: a}\nmodel: {path: x}\n", "task: missing; expected a section with type: one of letter_count"),
    ("run: {dir: a}\nmodel: {path: x}\ntask: {type: poems}\n", "task.type: expected one of letter_count"),
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
    ("all_unreadable", [3] * 20, {"max_bad_rows": 1.0}, "no row is left for evaluation"),
    ("one_left", [3] * 9 + [GOOD], {"max_bad_rows": 1.0}, "no row is left for training"),
    ("no_demonstrations", [GOOD, {**GOOD, "question": "2+0?"}] * 10, {}, "task.demonstration_column"),
    (
        "long_demonstration",
        [{**GOOD, "question": f"{i}?", "solution": "1" * 500} for i in range(20)],
        {"demonstration_column": "solution"},
        "tokens, actors.max_model_len is 128",
    ),
]


def on_rows(folder: Path, lines: list[Any], **task: Any) -> str:
    """A config for lines of a data set, bytes as they are and others as JSON, without a warm start."""
    path = folder / "data.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    task = {"type": "dataset", "path": str(path), **task}
    return write_config(folder, {**TINY, "stages": ["online"], "task": task})


@pytest.mark.parametrize(("rows", "task", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_data_set(refused, tmp_path: Path, rows: list[Any], task: dict[str, Any], expected: str) -> None:
    config = on_rows(tmp_path, rows, **task)
    assert expected in refused("train", config, "stages=[warm_start, online]")
    assert_nothing_begun(tmp_path / "run")


def assert_nothing_begun(run_dir: Path) -> None:
    """At most the lock, and the initial model that the data were measured with, were made."""
    assert {path.name for path in run_dir.iterdir()} <= {"lock", "model", "model.sha256"}


BAD_ROWS = {
    "bad_json": (b'{"question": "1+1?", "answer": ', "not JSON: "),
    "no_object": (b'["1+1?", "2"]', "expected a JSON object, found list"),
    "wrong_type": (b'{"question": "1+1?", "answer": {"value": 2}}', "column 'answer': expected text, found "),
    "null_answer": (b'{"question": "1+1?", "answer": null}', "column 'answer': expected text, found null"),
    "no_answer": (b'{"question": "1+1?"}', "column 'answer': missing in this row"),
    "bad_utf8": (b'{"question": "1+1\xff?", "answer": "2"}', "not UTF-8"),
    "half_surrogate": (b'{"question": "\\ud800", "answer": "2"}', "column 'question': expected text, found "),
    "twice": (
        b'{"question": "1?", "answer": "2", "answer": "3"}',
        "column answer: expected it once in a row, found it",
    ),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_counted_and_above_the_limit_refused(
    refused, accepted, tmp_path: Path, bad: bytes, reason: str
) -> None:
    """Two of twenty, at a limit of exactly two and of less."""
    rows = [{**GOOD, "question": f"{i}+1?"} for i in range(18)]
    config = on_rows(tmp_path, [*rows[:4], bad, *rows[4:], bad], max_bad_rows=0.1)
    path = tmp_path / "data.jsonl"
    assert f"task.path: 2 of 20 rows skipped, the first: {path}:5: {reason}" in accepted("check", config)
    message = refused("train", config, "task.max_bad_rows=0.09")
    limit = "more than task.max_bad_rows 0.09; mend or remove them, or raise it"
    begin = f"error: task.path {path}: 2 of 20 rows are unreadable, {limit}; the first: "
    assert message.startswith(f"{begin}{path}:5: {reason}") and f"; {path}:20: {reason}" in message
    assert_nothing_begun(tmp_path / "run")


@pytest.mark.parametrize("place", [3, 10], ids=["training", "held_out"])
def test_a_prompt_fits_to_the_token(refused, accepted, tmp_path: Path, place: int) -> None:
    """48 letters are 50 tokens; max_tokens is 40. Row 10 is held out."""
    rows = [{**GOOD, "question": f"{i}?"} for i in range(1, 12)]
    rows[place - 1]["question"] = "1" * 48
    config = on_rows(tmp_path, rows)
    assert "up to 90 tokens" in accepted("check", config, "actors.max_model_len=90")
    split, count = ("train", "1 of 10 training") if place == 3 else ("held_out", "1 of 1 held-out")
    reason = f"prompt {split}/{place} has 50 tokens; actors.max_model_len minus sampling.max_tokens leaves 49"
    assert refused("train", config, "actors.max_model_len=89") == (
        f"error: task: {count} prompts are unusable, more than task.max_bad_rows 0.01; mend or remove them, or "
        f"raise it; the first: {reason}"
    )
    assert_nothing_begun(tmp_path / "run")
    if place == 3:
        note = f"task: 1 of 10 training prompts left out, the first: {reason}"
        assert note in accepted("check", config, "actors.max_model_len=89", "task.max_bad_rows=0.1")


DIRECTORIES = [
    (
        "/proc/rlsys",
        ": /proc/rlsys cannot be created (No such file or directory); choose another run.dir",
    ),  # nobody can make a folder there
    ("{tmp}/file/run", " {tmp}/file/run: expected a folder, but {tmp}/file is no folder; choose another run.dir"),
    ("{tmp}/file", " {tmp}/file: expected a folder, but {tmp}/file is no folder; choose another run.dir"),
]


@pytest.mark.parametrize(("run_dir", "expected"), DIRECTORIES, ids=[run_dir for run_dir, _ in DIRECTORIES])
def test_a_run_directory_that_cannot_be_written(refused, tmp_path: Path, run_dir: str, expected: str) -> None:
    (tmp_path / "file").write_text("")
    message = refused("train", write_config(tmp_path, TINY), f"run.dir={run_dir.format(tmp=tmp_path)}")
    assert message.startswith(f"error: run.dir{expected.format(tmp=tmp_path)}")


def test_a_run_directory_in_use_is_refused_with_its_owner(refused, tmp_path: Path) -> None:
    config = write_config(tmp_path, TINY)
    with RunLock(tmp_path / "run") as lock:
        assert refused("train", config) == (
            f"error: run.dir: {tmp_path / 'run'} is in use by process {os.getpid()} on {lock.owner['host']}; stop that "
            "run or choose another run.dir"
        )
        assert_nothing_begun(tmp_path / "run")


FIXED = [
    ("run.seed=4", "run.seed differs"),
    ("task.max_length=5", "task.max_length differs"),
    ("model.from_scratch.layers=3", "model.from_scratch.layers differs"),
    ("stages=[warm_start,search,preference,online]", "stages differs"),
]


@pytest.mark.parametrize(("override", "expected"), FIXED, ids=[override for override, _ in FIXED])
def test_resume_that_changes_a_fixed_field(refused, finished_run: FinishedRun, override: str, expected: str) -> None:
    before = (finished_run.dir / "config.yaml").read_text()
    message = refused("train", finished_run.config, override)
    assert expected in message and "expected" in message and "found" in message
    assert (finished_run.dir / "config.yaml").read_text() == before


def test_refused_resume_leaves_the_config_of_the_run(refused, finished_run: FinishedRun) -> None:
    before = (finished_run.dir / "config.yaml").read_text()
    assert "needs 2,000 threads" in refused("train", finished_run.config, "actors.threads=1000", "train.max_steps=99")
    assert (finished_run.dir / "config.yaml").read_text() == before


def test_used_directory_is_refused_when_resume_is_never(refused, finished_run: FinishedRun) -> None:
    assert "choose another run.dir" in refused("train", finished_run.config, "run.resume=never")


def test_raising_max_steps_is_allowed(finished_run: FinishedRun) -> None:
    config = load_config(finished_run.config, ["train.max_steps=20"])
    start = find_start(config, finished_run.dir, CheckpointStore(finished_run.dir / "checkpoints", 2))
    assert (start.state.stage, start.state.step, start.state.weight_version) == (4, 10, 70)


def test_check_prints_a_config_that_can_be_read_again(tmp_path: Path) -> None:
    config = write_config(tmp_path, TINY)
    done = _command("check", config, "train.max_steps=7", "--resolved")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout.partition("\nrun  ")[0]
    (tmp_path / "resolved.yaml").write_text(text)
    assert load_config(tmp_path / "resolved.yaml") == load_config(config, ["train.max_steps=7"])
    assert yaml.safe_load(text)["train"]["max_steps"] == 7
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_step=5", "train.max_step: unknown key"),
        pytest.param(  # builds the model
            "actors.kv_cache_gib=100000",
            "actors.count, actors.kv_cache_gib or learner.ranks: ",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_real_process_says_one_line_and_exits_with_2(tmp_path: Path, override: str, expected: str) -> None:
    done = _command("train", write_config(tmp_path, TINY), override)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and expected in done.stderr


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "has 2 attention heads and 2 key-value heads, which 4 ranks cannot share; choose one of 1, 2"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 8, "use_sliding_window": True},
            "has layers with a window or a state, so ranks cannot share its rows; set learner.sequence_parallel to 1",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_model_whose_rows_ranks_cannot_share(
    refused, tmp_path: Path, command: str, changes: dict[str, Any], expected: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tmp_path / "model"
    build_from_scratch(FromScratchConfig(hidden_size=64, layers=2, heads=2, max_positions=128), [], 0, model)
    if changes:
        config = AutoConfig.from_pretrained(model, **changes, layer_types=["full_attention", "sliding_attention"])
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
    learner = {"ranks": 4, "sequence_parallel": 4}
    config = write_config(tmp_path, {**TINY, "model": {"path": str(model)}, "learner": learner})
    assert f"learner.sequence_parallel 4: model.path {model} {expected}" in refused(command, config)


@pytest.mark.long
def test_a_full_run_directory_is_said_in_one_line_before_anything_starts(tmp_path: Path) -> None:
    """No file may have more than 50 bytes: the lock fits in part, which its owner does not mind."""
    build_from_scratch(FromScratchConfig(hidden_size=32, layers=1, heads=1), [], 0, tmp_path / "model")
    config = write_config(tmp_path, {**TINY, "model": {"path": str(tmp_path / "model")}})
    done = _command("train", config, file_bytes=50)
    path = tmp_path / "run" / "config.yaml"
    assert done.stderr == f"error: {path}: could not be written: [Errno 27] File too large\n"
    assert (done.returncode, done.stdout) == (1, "")  # the disk is at fault, not the input
    assert {path.name for path in path.parent.iterdir()} == {"lock"}


def test_damaged_checkpoints_alone_are_said_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_000005"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{")
    done = _command("train", write_config(tmp_path, TINY))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {folder.parent}: none of the 1 checkpoints is valid ({folder / 'MANIFEST.json'}: "
    )
    assert done.stderr.endswith(f"; restore one, or delete {folder.parent} to start again from scratch\n")
    assert (folder / "MANIFEST.json").read_text() == "{"


def _command(*arguments: str, file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlsys.cli", *arguments]
    if file_bytes is not None:
        command = ["prlimit", f"--fsize={file_bytes}", *command]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
