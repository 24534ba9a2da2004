"""A job in the storm of `make chaos`, with a program in the place of rlsys."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
number = int(os.environ["RLSYS_CHAOS_MARK"].rsplit(".", 1)[1])
do = sys.argv[2 + number]
if do in ("done", "saved", "unsaved"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0 if do == "done" else 143))
print(f"the {number}th", flush=True)
with (folder / "metrics.jsonl").open("a") as rows:
    version = int(do.startswith("unsaved"))
    rows.write(json.dumps({"stage": "online", "step": number + 1, "weights/version": version}) + "\\n")
if do.startswith(("fail", "late")):
    time.sleep(1)
if do.startswith("fail"):
    print("SAVE FAILED, training goes on", flush=True)
    time.sleep(0.5)
if do == "fail":
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps({"stage": "online", "step": number + 100}) + "\\n")
if do == "unsaved, said":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("the learner was lost as well; it is saved") or 143))
if do in ("done", "fail", "wait", "saved", "unsaved", "unsaved, said"):
    time.sleep(60)
print("its last word", flush=True)
sys.exit(int(do.split()[-1]))
"""


def leaving(seconds: float, environment: str) -> str:
    """A program that leaves a process of this environment, where `run` is the name of the run."""
    sleep = f"import time; time.sleep({seconds})"
    return (
        "import os, subprocess, sys\n"
        "run = os.path.basename(sys.argv[1])\n"
        f"subprocess.Popen([sys.executable, '-c', '{sleep}'], env={{{environment}}})\n"
    )


@pytest.fixture
def weather(modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a job whose driver does one thing after the other: ends with a code, or waits to be ended."""
    storm = modules["storm"]
    monkeypatch.setattr(storm, "LOOK_S", 0.02)
    told: list[str] = []

    def run(*does: str, kinds: tuple[str, ...] = (), limit_s: float = 30.0) -> Any:
        run_dir = tmp_path / f"job-{len(told)}-{os.getpid()}"
        run_dir.mkdir()
        began = time.monotonic()
        job = storm.JobStorm(0, run_dir, Path("config"), [], {}, began, lambda at, what: told.append(what))
        job._command = [sys.executable, "-c", DRIVER, str(run_dir), *does]
        injections = [modules["storm_plan"].Injection(kind, 0.05, 0.5) for kind in kinds]
        calm = itertools.repeat(modules["storm_plan"].Injection("SIGKILL actor", 0.05, 0.5))
        job.run(itertools.chain(injections, calm), began + limit_s)
        return job

    return run


def test_a_driver_that_is_ended_is_started_again_until_it_ends_by_0(weather: Any) -> None:
    job = weather("wait", "saved", "0", kinds=("SIGKILL driver", "SIGTERM driver"))
    assert job.finished and not job.problems and not job.unasked and len(job.starts) == 3
    assert [fault.followed for fault in job.faults] == ["exit code -9", "exit code 143"]
    assert all(fault.next_step_s is not None and fault.gone_s is not None for fault in job.faults)
    assert job.orphans == []


@pytest.mark.parametrize(
    ("does", "problem"),
    [("wait", "exit code -15"), ("unsaved", "its last step made version 1, its last checkpoint has 0")],
)
def test_a_driver_that_is_told_to_stop_saves_first(weather: Any, does: str, problem: str) -> None:
    job = weather(does, "0", kinds=("SIGTERM driver",))
    assert job.finished and job.problems == [f"SIGTERM driver: {problem}"]


def test_a_driver_that_has_lost_its_learner_says_what_is_saved(weather: Any) -> None:
    job = weather("unsaved, said", "0", kinds=("SIGTERM driver",))
    assert job.finished and not job.problems


def test_an_end_that_nobody_asked_for_is_named_and_survived(weather: Any) -> None:
    job = weather("1", "0")
    assert job.finished and job.unasked == ["start 0: exit code 1, its last word"]


def test_a_refused_command_ends_the_job(weather: Any) -> None:
    job = weather("2", "0")
    assert not job.finished and job.problems == ["given up: the command was refused"] and len(job.starts) == 1


def test_a_job_is_given_up_when_its_time_is_over_and_nothing_of_it_stays(weather: Any) -> None:
    job = weather("wait", limit_s=0.5)
    assert not job.finished and job.problems == ["given up: the time was over"]
    assert job.starts[0].process.returncode == -signal.SIGKILL


def test_a_process_that_outlives_its_driver_is_an_orphan_and_is_ended(
    weather: Any, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules["storm"], "GONE_S", 0.5)
    monkeypatch.setattr(sys.modules[__name__], "DRIVER", leaving(60, "**os.environ, 'RLSYS_RUN_ID': run") + DRIVER)
    job = weather("0")  # it carries both marks and counts once
    assert job.finished and len(job.orphans) == 1 and "time.sleep(60)" in job.orphans[0]
    pid = int(job.orphans[0].split()[1])
    assert not psutil.pid_exists(pid) or modules["storm_processes"].is_gone(psutil.Process(pid))


@pytest.mark.parametrize(
    ("do", "met", "followed"),
    [
        ("fail", True, "1 saves failed, and training went on"),
        ("wait", False, "0 saves failed, and training went on"),
        ("late 1", True, "the driver ended"),
        ("late 0", False, "the driver ended"),
        ("fail 1", True, "the driver ended"),  # the save after the one that failed was needed
    ],
)
def test_a_full_disk_counts_where_a_save_failed(
    weather: Any, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, do: str, met: bool, followed: str
) -> None:
    storm = modules["storm"]
    monkeypatch.setattr(storm, "running", lambda what, mark: [psutil.Process()] if what == "rank" else [])
    monkeypatch.setattr(storm, "limit_files", lambda *_: None)
    monkeypatch.setattr(storm, "FULL_S", 2.0)
    monkeypatch.setattr(storm, "STOP_LIMIT_S", 5.0)
    # A second fault would race with the exit of the second driver, so only a driver that goes on gets it.
    kinds = ("disk full",) if followed == "the driver ended" else ("disk full", "SIGKILL driver")
    job = weather(do, "0", kinds=kinds)
    assert (job.faults[0].took_effect, job.faults[0].followed) == (met, followed)
    assert job.finished and not job.problems and not job.unasked


SAVING = """
import logging, os, sys
from pathlib import Path
from rlsys.run.checkpoints import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]) / "checkpoints", 2)
if os.environ["RLSYS_CHAOS_MARK"].endswith(".0"):
    for version in (9, 10):
        temporary = store.begin(f"step_{version:06d}")
        (temporary / "state.json").write_text("{}")
        store.commit(temporary, f"step_{version:06d}", {"weight_version": version})
elif LOOKS:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    store.latest()
"""


@pytest.mark.parametrize("looks", [True, False])
def test_the_next_start_has_to_name_a_damaged_checkpoint(
    weather: Any, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "DRIVER", SAVING.replace("LOOKS", str(looks)) + DRIVER)
    job = weather("wait", "0", kinds=("damaged checkpoint",))
    assert job.finished and job.faults[0].took_effect == looks and "step_000010" in job.faults[0].followed
    blame = "damaged checkpoint: start 1 of the driver did not name step_000010"
    assert job.problems == ([] if looks else [blame])


def test_a_driver_that_was_done_before_it_was_asked_to_stop_was_not_hit(weather: Any) -> None:
    job = weather("wait", "done", kinds=("SIGTERM driver", "SIGTERM driver"))
    assert job.finished and [fault.took_effect for fault in job.faults] == [True, False]


@pytest.mark.parametrize(("ends_after_s", "orphans"), [(0.5, 0), (60, 1)])
def test_a_verifier_has_the_same_time_to_end_as_the_rest(
    weather: Any, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, ends_after_s: float, orphans: int
) -> None:
    monkeypatch.setattr(modules["storm"], "GONE_S", 2.0)
    monkeypatch.setattr(sys.modules[__name__], "DRIVER", leaving(ends_after_s, "'RLSYS_RUN_ID': run") + DRIVER)
    assert len(weather("0").orphans) == orphans
