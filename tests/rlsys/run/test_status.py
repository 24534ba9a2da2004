"""The state of a run, read from files that the writers of a run have made."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from resumable_runs import config

from rlsys.config.files import dump_config
from rlsys.errors import AbortedRunError, ConfigError, DamagedFileError, EngineError, InterruptedRunError
from rlsys.run.journal import Journal, read_heartbeat
from rlsys.run.ledger import Ledger
from rlsys.run.lock import RunLock
from rlsys.run.metrics import MetricsWriter
from rlsys.run.status import read_status

STEP = {"time/step_s": 2.0, "time/learn_s": 1.0, "learner/tokens": 10.0}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two stages of 2 and 3 steps, in the middle of the second."""
    values = config(warm_start={"max_steps": 2}, train={"max_steps": 3})
    assert values.stages == ("warm_start", "online")
    (tmp_path / "config.yaml").write_text(dump_config(values))
    log(tmp_path, ("warm_start", 1), ("warm_start", 2), ("online", 0), ("online", 1))
    return tmp_path


def log(run_dir: Path, *steps: tuple[str, int], resume_version: int = -1, **metrics: float) -> None:
    writer = MetricsWriter(run_dir, resume_version)
    for stage, step in steps:
        version = step if stage == "warm_start" else 2 + step
        writer.log(
            stage, step, version, {**STEP, **{name.replace("__", "/"): value for name, value in metrics.items()}}
        )
    writer.close()


def export(run_dir: Path) -> None:
    folder = run_dir / "stages" / "online"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def lock_of(run_dir: Path, **changes: Any) -> Mapping[str, Any]:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "uuid": "0"} | changes
    (run_dir / "lock").write_text(json.dumps(owner))
    return owner


def test_a_running_run(run_dir: Path) -> None:
    with RunLock(run_dir), Journal(run_dir) as journal:
        journal.say("actor 0 is lost")
        journal.beat(
            [{"name": "actor 0", "state": "serving", "calls": 2, "silent_s": 3.0}], {"call": "train", "seconds": 4.0}
        )
        status = read_status(run_dir)
    assert status.state == "running" and str(os.getpid()) in status.reason
    assert (status.stage, status.step, status.steps, status.weight_version) == ("online", 1, 3, 3)
    assert status.stages == {"warm_start": (2, 2), "online": (1, 3)}
    assert status.left_s == 2 * 2.0
    assert status.heartbeat is not None and status.heartbeat.learner["call"] == "train"
    assert status.messages[0].endswith("actor 0 is lost")


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "interrupted", "steps are missing; the same command continues"),
        (InterruptedRunError("SIGTERM; saved, it continues"), "interrupted", "SIGTERM; saved, it continues"),
        (AbortedRunError("SIGINT twice"), "interrupted", "SIGINT twice; the same command continues"),
        (EngineError("Ray is lost"), "failed", "Ray is lost"),
        (OSError("no space"), "failed", "OSError: no space"),
    ],
)
def test_an_ended_command(run_dir: Path, error: Exception | None, state: str, reason: str) -> None:
    try:
        with RunLock(run_dir), Journal(run_dir):
            if error:
                raise error
    except type(error) if error else ():  # noqa: B030 - nothing is raised without an error
        pass
    status = read_status(run_dir)
    assert (status.state, status.reason) == (state, reason)


def test_a_finished_run(run_dir: Path) -> None:
    log(run_dir, ("online", 2), ("online", 3), resume_version=3)
    assert read_status(run_dir).state == "interrupted", "the policy is not exported yet"
    export(run_dir)
    status = read_status(run_dir)
    assert (status.state, status.step, status.left_s) == ("finished", 3, None)


@pytest.mark.heavy
def test_a_killed_driver_has_crashed(run_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    lock_of(run_dir, pid=child.pid)
    status = read_status(run_dir)
    assert status.state == "crashed" and f"process {child.pid}" in status.reason


def test_a_process_that_got_the_number_of_a_killed_driver_is_another(run_dir: Path) -> None:
    lock_of(run_dir)
    os.utime(run_dir / "lock", (1000, 1000))  # long before this process began
    assert read_status(run_dir).state == "crashed"


def test_another_host_is_judged_by_the_heartbeat(run_dir: Path) -> None:
    lock_of(run_dir, host="elsewhere")
    assert read_status(run_dir).state == "unknown"
    with Journal(run_dir):
        assert read_status(run_dir).state == "running"
        beat = json.loads((run_dir / "heartbeat.json").read_text())
        (run_dir / "heartbeat.json").write_text(json.dumps(beat | {"time": beat["time"] - 3600}))
        assert read_status(run_dir).state == "unknown"


def test_failures_checkpoint_prompts_and_the_last_error(run_dir: Path) -> None:
    log(run_dir, ("online", 2), resume_version=3, process__actor_restarts=2, rollout__failed=3, held_out__pass_at_k=0.5)
    folder = run_dir / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{}")
    ledger = Ledger(run_dir, -1)
    ledger.note("trained", [0, 1])
    ledger.note("filtered", [2])
    ledger.close_step(3, 3, [])
    ledger.close()
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "actor-1.log").write_text(
        "INFO fine\nTraceback (most recent call last):\nValueError: bad\nbye\n"
    )
    status = read_status(run_dir)
    assert {name: value for name, value in status.counts.items() if value} == {
        "actor_restarts": 2,
        "failed_rollouts": 3,
    }
    assert status.prompts == {"trained": 2, "filtered": 1, "skipped": 0}
    assert status.held_out == {"pass@k": 0.5, "weight version": 4}
    assert status.checkpoint is not None and status.checkpoint.weight_version == 3
    assert status.last_error is not None
    assert status.last_error.file.endswith("actor-1.log") and status.last_error.line == "ValueError: bad"
    assert status.disk_bytes > 0 and status.free_bytes > 0


def test_nothing_is_written(run_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    read_status(run_dir)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a run directory of `rlsys train`, found no config\.yaml"):
        read_status(tmp_path)
    assert read_heartbeat(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[1]", '{"pulse": 1}', "{", '{"started": "a", "time": "b"}', "null"])
def test_a_damaged_heartbeat_is_named_and_the_rest_is_told(run_dir: Path, text: str) -> None:
    (run_dir / "heartbeat.json").write_text(text)
    status = read_status(run_dir)
    path = run_dir / "heartbeat.json"
    assert status.faults == [f"{path}: expected a heartbeat; remove the file, which the next command writes"]
    assert (status.heartbeat, status.weight_version) == (None, 3)


def test_metrics_that_lost_their_rows_are_named(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_bytes(b"")
    assert read_status(run_dir).faults == [], "before the first step"
    (run_dir / "checkpoints" / "step_000003").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_000003" / "MANIFEST.json").write_text("{}")
    [fault] = read_status(run_dir).faults
    assert fault.startswith(f"{run_dir / 'metrics.jsonl'}: expected a row for each training step, found none, and ")
    (run_dir / "metrics.jsonl").write_bytes(b"\x00\x01\xffbinary")
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl:1: expected a row"):
        read_status(run_dir)


def test_a_run_that_continues_without_its_rows_says_so(tmp_path: Path) -> None:
    messages: list[str] = []
    MetricsWriter(tmp_path, -1, messages.append).close()
    MetricsWriter(tmp_path, 0, messages.append).close()
    assert messages == []
    MetricsWriter(tmp_path, 4, messages.append).close()
    assert len(messages) == 1 and "expected rows to weight version 4, found none" in messages[0]
    (tmp_path / "resumed_from.json").write_text("{}")  # it began from the checkpoint of another run
    MetricsWriter(tmp_path, 4, messages.append).close()
    assert len(messages) == 1


def test_files_that_vanish_meanwhile_do_no_harm(run_dir: Path) -> None:
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "actor-0.log").symlink_to(run_dir / "gone")
    (run_dir / "checkpoints" / "step_000001").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_000001" / "MANIFEST.json").symlink_to(run_dir / "gone")
    status = read_status(run_dir)
    assert status.last_error is None and status.disk_bytes > 0


def test_the_directory_of_a_search_is_refused(run_dir: Path) -> None:
    (run_dir / "search.json").write_text("{}")
    with pytest.raises(ConfigError, match="found a search; `rlsys show"):
        read_status(run_dir)
