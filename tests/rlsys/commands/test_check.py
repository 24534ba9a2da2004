"""`rlsys check` as a user reads it: a summary, notes, trials and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlsys.commands import check
from rlsys.config.files import load_config, parse_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.launch import devices, resources, session
from rlsys.run.checkpoints import CheckpointStore

TASK = """
import time
from rlsys.tasks.base import BaseTask
from rlsys.types import Problem, Verdict

class Echo(BaseTask):
    def __init__(self, seed, fault=None):
        self.fault = fault

    def problem(self, split, index):
        return Problem(problem_id=f"{split}-{index}", question=f"{split} {index}?", answer=str(index))

    def verify(self, problem, completion, finished=True):
        if self.fault == "raises":
            raise KeyError("key")
        if self.fault == "hangs":
            time.sleep(60)
        right = completion == (problem.answer if self.fault is None else "never")
        return Verdict(outcome="ok" if right else "wrong", reward=float(right), answered=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.py").write_text(TASK)
    return tmp_path


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"from_scratch": {}},
        "task": {"type": "letter_count"},
        "train": {"max_steps": 7, "groups_per_step": 4, "group_size": 2, "updates_per_step": 1},
        "actors": {"count": 1},
        "learner": {"ranks": 1},
    }
    return parse_config({**values, **changes}, "c.yaml")


def lines_of(config: Config, capsys: pytest.CaptureFixture[str], **options: bool) -> list[str]:
    check.run(config, **options)
    return capsys.readouterr().out.splitlines()


def test_the_summary_is_short_and_ends_with_a_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(config(), capsys)
    assert lines[0] == "run         runs/x: starting from the initial model"
    assert lines[1] == "warm_start  300 steps, each with 64 demonstrations"
    assert lines[2] == "online      7 steps, each with 4 prompts x 2 completions, 1 optimizer update"
    assert lines[3].startswith("model       from scratch: ") and lines[3].endswith(" parameters, learner in fp32")
    assert "processes   1 actor, 1 learner rank" in lines
    assert lines[-1] == "ok" and len(lines) < 15
    assert not (folder / "runs").exists()


def test_threads_are_whole_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.ResourcePlan, "check", lambda _plan: None)
    lines = lines_of(config(actors={"count": 1, "threads": 1234}), capsys)
    assert any(" 1,234 of " in line and " threads for rollout" in line for line in lines)


def test_the_resolved_config_is_an_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(lines_of(config(), capsys, resolved=True))
    (folder / "resolved.yaml").write_text(text.partition("\nrun  ")[0])
    assert load_config(folder / "resolved.yaml") == config()


def test_missing_gpus_are_a_warning_here_and_an_error_of_train(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_installed_gpus", lambda: 0)
    on_gpus = config(run={"dir": "runs/x", "device": "cuda"})
    lines = lines_of(on_gpus, capsys)
    assert lines[-1] == "ok, 1 warning"
    assert [
        line for line in lines if line.startswith("warning: run.device cuda: expected 2 GPUs on this machine, found")
    ]
    with pytest.raises(ConfigError, match="^run.device cuda: expected 2 GPUs on this machine, found none"):
        session.train(on_gpus)
    assert not (folder / "runs").exists()


def test_the_verifier_of_an_own_task_is_tried(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"type": "custom", "fn": "echo.py:Echo"}
    lines = lines_of(config(task=own, stages=["online"]), capsys)
    assert lines[-3] == "reward of the completion '0' to problem held_out-0: 1"
    assert lines[-2] == "reward of the completion '<answer>0</answer>' to problem held_out-0: 0"
    assert lines[-1] == "ok"
    lines = lines_of(config(task={**own, "arguments": {"fault": "never"}}, stages=["online"]), capsys)
    assert lines[-2].startswith("warning: task: verify gives none of these a reward above 0")
    assert lines[-1] == "ok, 1 warning"


def test_fewer_training_problems_than_a_step_takes_are_a_note(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.csv").write_text("question,answer\n" + "".join(f"{n}?,{n}\n" for n in range(4)))
    task = {"type": "dataset", "path": "rows.csv", "held_out_every": 2}
    note = "train.groups_per_step 4 exceeds the number of training problems, 2: a step has some of them more than once"
    lines = lines_of(config(task=task, stages=["online"]), capsys)
    assert [line for line in lines if line.startswith(note)] and lines[-1] == "ok"
    few = {"max_steps": 7, "groups_per_step": 2, "group_size": 2, "updates_per_step": 1}
    assert note[:22] not in "\n".join(lines_of(config(task=task, stages=["online"], train=few), capsys))


@pytest.mark.parametrize(("fault", "detail"), [("raises", "KeyError: 'key'"), ("hangs", "0.5 s")])
def test_a_verifier_that_fails_is_refused(folder: Path, fault: str, detail: str) -> None:
    task = {"type": "custom", "fn": "echo.py:Echo", "arguments": {"fault": fault}}
    with pytest.raises(ConfigError, match=f"^task: verify failed on the completion '0': .*{detail}"):
        check.run(config(task=task, stages=["online"], rewards={"timeout_s": 0.5}))


def test_a_conflict_with_an_earlier_run_hides_no_other_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def conflict(*_: Any) -> None:
        raise ConfigError("run.seed differs")

    monkeypatch.setattr("rlsys.launch.prepare.find_start", conflict)
    with pytest.raises(ConfigError, match="^run.seed differs$"):
        check.run(config())
    task = {"type": "dataset", "path": "none.jsonl"}
    with pytest.raises(ConfigError, match="^run.seed differs; and apart from this, task.path none.jsonl: no such file"):
        check.run(config(task=task))
    assert CheckpointStore(folder / "runs" / "x" / "checkpoints", 1).latest() is None


def test_the_directory_of_a_search_is_a_note_of_its_config_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs" / "x" / "trees").mkdir(parents=True)
    (folder / "runs" / "x" / "trees" / "00000.jsonl").touch()
    (folder / "runs" / "x" / "search.json").write_text("{}")
    lines = lines_of(config(search={"prompts": 8}), capsys)
    begins = "holds the trees of a search: `rlsys search` continues it; training needs another run.dir"
    assert lines[0].split(maxsplit=1) == ["run", f"runs/x: {begins}"]
    for refused in (lambda: lines_of(config(), capsys), lambda: session.train(config(search={"prompts": 8}))):
        with pytest.raises(ConfigError, match="holds the trees of a search: choose another run.dir"):
            refused()


def test_a_config_of_a_search_says_what_the_search_would_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searched = config(search={"prompts": 32, "stop": {"simulations": 64, "tokens": 1000}})
    [line] = [line for line in lines_of(searched, capsys) if "trees of" in line]
    expected = "trees of 32 train prompts, at most 64 simulations or 1,000 tokens each; the stages are those of"
    assert line.split(maxsplit=2)[2] == f"{expected} `rlsys train`"
    assert not any("trees of" in line for line in lines_of(config(), capsys))
