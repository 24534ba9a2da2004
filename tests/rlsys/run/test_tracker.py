"""Experiment trackers: what they get, also after a resume, and that no failure of theirs reaches the run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from resumable_runs import config

from rlsys.config.files import dump_config, parse_config
from rlsys.errors import ConfigError
from rlsys.files import read_json
from rlsys.run import tracker as tracker_process
from rlsys.run import trackers
from rlsys.run.metrics import MetricsWriter
from rlsys.run.tracker import Follower
from rlsys.run.trackers import check_installed, following


class Recorder:
    """A tracker that keeps what it gets, by the id of the tracker's run."""

    runs: dict[str, list[tuple[int, Mapping[str, float]]]]
    refuses: set[int]

    def __init__(self, _config: Any, run_dir: Path, run_id: str) -> None:
        self.id = run_id or f"run-{len(self.runs)}"
        self.runs.setdefault(self.id, [])

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        if version in self.refuses:
            raise RuntimeError(f"no\nplace for {version}")
        self.runs[self.id].append((version, metrics))

    def finish(self) -> None:
        self.runs[self.id].append((-1, {}))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    Recorder.runs, Recorder.refuses = {}, set()
    monkeypatch.setattr(tracker_process, "OPENERS", {"wandb": Recorder})
    return Recorder


def write(run_dir: Path, versions: range, resume_version: int) -> None:
    (run_dir / "config.yaml").write_text(dump_config(config()))
    writer = MetricsWriter(run_dir, resume_version)
    for version in versions:
        writer.log("online", version, version, {"rollout/reward": version / 8, "learner/loss": float("nan")})
    writer.close()


def follow(run_dir: Path, *batches: tuple[range, int]) -> list[str]:
    """Follow a run in one process of the tracker, and return its messages."""
    said: list[str] = []
    follower = Follower("wandb", run_dir, said.append)
    opened = follower.open()
    for versions, resume_version in batches:
        write(run_dir, versions, resume_version)
        follower.send_new_rows(opened)
        follower.send_new_rows(opened)
    return said


def test_rows_are_sent_once_under_their_names(tmp_path: Path, recorder: type[Recorder]) -> None:
    write(tmp_path, range(1, 3), -1)
    assert follow(tmp_path, (range(3, 5), 2)) == []
    assert recorder.runs == {"run-0": [(n, {"weights/version": n, "rollout/reward": n / 8}) for n in range(1, 5)]}


def test_a_resumed_run_and_a_rollback_continue_the_same_run(tmp_path: Path, recorder: type[Recorder]) -> None:
    """Versions 4 and 5 are made twice, in one command; then another command goes on after version 6."""
    write(tmp_path, range(0), -1)
    follow(tmp_path, (range(1, 6), -1), (range(4, 7), 3))
    follow(tmp_path, (range(7, 9), 6))
    assert [version for version, _ in recorder.runs["run-0"]] == list(range(1, 9))
    assert list(recorder.runs) == ["run-0"]
    assert read_json(tmp_path / "trackers" / "wandb.json")["id"] == "run-0"


def test_two_rows_of_one_version_are_both_sent(tmp_path: Path, recorder: type[Recorder]) -> None:
    write(tmp_path, range(1, 4), -1)
    follow(tmp_path)
    writer = MetricsWriter(tmp_path, 3)
    writer.log("late", 0, 3, {"held_out/greedy_accuracy": 0.5})
    writer.close()
    follower = Follower("wandb", tmp_path, print)
    follower.send_new_rows(follower.open())
    assert [version for version, _ in recorder.runs["run-0"]] == [1, 2, 3, 3]


def test_refused_rows_are_reported_once_and_counted(tmp_path: Path, recorder: type[Recorder]) -> None:
    recorder.refuses = {2, 3}
    write(tmp_path, range(0), -1)
    (message,) = follow(tmp_path, (range(1, 5), -1))
    assert "RuntimeError: no place for 2" in message and "counted in" in message
    assert [version for version, _ in recorder.runs["run-0"]] == [1, 4]
    assert read_json(tmp_path / "trackers" / "wandb.json")["failures"] == 2


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()  # as W&B leaves one in the place where it ran
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"run\.trackers: the package wandb is not installed; pip install wandb"):
        check_installed(["wandb"])
    check_installed([])


def test_a_tracker_named_twice_is_refused() -> None:
    values = config().model_dump(mode="json", exclude_unset=True)
    with pytest.raises(ConfigError, match=r"run\.trackers: expected each tracker once, found mlflow 2 times"):
        parse_config({**values, "run": {"dir": "unused", "trackers": ["mlflow", "mlflow"]}}, "test")


FAKE_WANDB = """
import os, time
class Run:
    config = {{}}
    def log(self, metrics, step):
        with open({path!r}, "a") as file:
            file.write(f"{{step}}\\n")
    def finish(self):
        with open({path!r}, "a") as file:
            file.write("finished\\n")
def init(**arguments):
    print("noise of the package")
    {init}
    return Run()
"""


def run_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str) -> tuple[list[str], list[str]]:
    """Run the tracker's process with a package whose `init` begins so; return its lines and the messages."""
    got, packages = tmp_path / "got", tmp_path / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text(FAKE_WANDB.format(path=str(got), init=init))
    monkeypatch.setenv("PYTHONPATH", f"{Path(trackers.__file__).parents[2]}:{packages}")
    said: list[str] = []
    write(tmp_path, range(1, 3), -1)
    with contextlib.suppress(KeyError), following(tmp_path, ["wandb"], said.append):
        write(tmp_path, range(3, 5), 2)
        raise KeyError  # the run fails
    return got.read_text().split() if got.exists() else [], said


@pytest.mark.heavy
def test_the_process_sends_all_rows_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_beside(tmp_path, monkeypatch, "") == (["1", "2", "3", "4", "finished"], [])
    assert "noise of the package" in (tmp_path / "logs" / "tracker-wandb.log").read_text()


@pytest.mark.heavy
def test_a_tracker_that_cannot_start_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got, said = run_beside(tmp_path, monkeypatch, "raise SystemExit('no login')")
    assert got == []
    assert said == ["tracker wandb: SystemExit: no login; the run goes on without it"]


@pytest.mark.heavy
def test_a_tracker_that_blocks_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_END_S", 0.5)
    got, (message,) = run_beside(tmp_path, monkeypatch, "time.sleep(600)")
    assert got == []
    assert "still sending" in message
