"""The storm of `make chaos`: its plan follows from the seed, its figures from what the jobs wrote."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from rlsys.run.checkpoints import CheckpointStore


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    names = ("storm_plan", "storm_figures", "storm_processes", "storm")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def plan(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["storm_plan"]


@pytest.fixture
def figures(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["storm_figures"]


@pytest.fixture
def processes(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["storm_processes"]


# --- the plan ---


def test_a_schedule_follows_from_its_seed_and_brings_every_kind(plan: ModuleType) -> None:
    def first(seed: int, job: int, count: int = 60) -> list[Any]:
        return list(itertools.islice(plan.schedule(seed, job, 30.0), count))

    assert first(3, 1) == first(3, 1)
    assert first(3, 1) != first(4, 1) and first(3, 1) != first(3, 3)
    every = [one.kind for one in first(3, 1, len(plan.KINDS))]
    assert sorted(every) == sorted(plan.KINDS)
    spared = [one.kind for one in first(3, 0, len(plan.KINDS) - 1)]
    assert sorted([*spared, plan.STOP_VERIFIER]) == sorted(plan.KINDS)
    assert plan.STOP_VERIFIER not in [one.kind for one in first(3, 0)]
    assert all(9.0 <= one.wait_s <= 51.0 for one in first(3, 0))
    assert sum(one.wait_s for one in first(3, 0, 2000)) / 2000 == pytest.approx(30.0, rel=0.05)
    assert {one.pick(2) for one in first(3, 0)} == {0, 1}


# --- the figures ---


def test_steps_that_a_rollback_dropped_are_counted_and_those_that_stay_are_not(figures: ModuleType) -> None:
    def text(*rows: tuple[int, float]) -> str:
        return "".join(json.dumps({"step": step, "time/step_s": seconds}) + "\n" for step, seconds in rows)

    seen = figures.Seen()
    assert len(seen.add(text((0, 0.0), (1, 1.0), (2, 2.0)) + '{"step": 3, "time')) == 3  # the last is not written yet
    assert seen.add(text((0, 0.0), (1, 1.0), (2, 2.0))) == []
    final = text((0, 0.0), (1, 1.0), (2, 2.5), (3, 3.0))  # step 2 was trained again
    assert [row["step"] for row in seen.add(final)] == [2, 3]
    assert seen.dropped(final) == [{"step": 2, "time/step_s": 2.0}]
    assert figures.training_steps(seen.add(text((0, 5.0)))) == []


def test_prompts_without_a_fate_are_lost_and_those_with_two_are_counted(figures: ModuleType) -> None:
    ledger = [
        {"version": 7, "before": [0], "trained": [], "filtered": [], "skipped": []},
        {"version": 8, "trained": [1, 2], "filtered": [3], "skipped": []},
        {"version": 9, "trained": [4, 2], "filtered": [], "skipped": [5]},
        {"version": 10, "trained": [3], "filtered": [5], "skipped": []},
    ]
    assert figures.prompts_of(ledger[:3], 9, [6, 7]) == (1, 1)  # 8 is nowhere, 2 is twice
    assert figures.prompts_of(ledger, 9, [6, 7, 8]) == (0, 3)  # filtered, then trained; skipped, then filtered
    assert figures.prompts_of(ledger[:2], 4, []) == (0, 0)


@pytest.fixture
def job(figures: ModuleType) -> Any:
    return figures.JobFigures(
        seed=0,
        starts=4,
        unasked=(),
        finished=True,
        steps=360,
        again=12,
        step_s=180.0,
        seconds=500.0,
        undisturbed_s=200.0,
        prompts=3840,
        prompts_lost=0,
        two_fates=0,
        verdicts_lost=0,
        skipped_steps=0,
        accuracy={"greedy": 0.98, "sampled": 0.95},
        undisturbed={"greedy": 0.98, "sampled": 0.96},
        sha256="ab",
        same_bytes=True,
    )


def test_what_a_job_is_blamed_for(figures: ModuleType, job: Any) -> None:
    def blamed(**changes: Any) -> list[str]:
        found: list[str] = figures.problems_of(dataclasses.replace(job, **changes), 512)
        return found

    assert blamed() == []
    assert "other bytes" in blamed(same_bytes=False)[0]
    assert blamed(same_bytes=False, verdicts_lost=1) == blamed(same_bytes=False, skipped_steps=1) == []
    # Of 512 problems at 0.96 and 0.91: 3 sqrt((0.96 0.04 + 0.91 0.09) / 512) = 0.046, less than 0.05.
    assert figures.noise(0.96, 0.91, 512) == pytest.approx(3 * ((0.0384 + 0.0819) / 512) ** 0.5)
    assert blamed(accuracy={"greedy": 0.98, "sampled": 0.92}) == []
    assert blamed(accuracy={"greedy": 0.98, "sampled": 0.91})[0].startswith("sampled accuracy 0.910")
    assert blamed(prompts_lost=2) == ["2 prompts lost, 0 with two outcomes"]
    assert blamed(two_fates=1) == ["0 prompts lost, 1 with two outcomes"]
    assert blamed(unasked=("start 2: exit code 1",)) == ["the driver ended unasked: start 2: exit code 1"]
    assert blamed(finished=False, accuracy={}, undisturbed={}, same_bytes=False) == ["the job was not finished"]
    assert blamed(undisturbed={}, undisturbed_s=0.0, same_bytes=False) == ["its undisturbed run failed"]
    assert figures.noise(1.0, 1.0, 512) == 1 / 512


def test_goodput_and_tables(figures: ModuleType, plan: ModuleType, job: Any) -> None:
    lost = dataclasses.replace(job, seed=1, finished=False, undisturbed_s=0.0, seconds=300.0, undisturbed={})
    assert figures.goodput([job]) == 0.4 and figures.goodput([job, lost]) == 0.25
    rows = figures.job_lines([job, lost])
    assert rows[2] == "| 0 | 500, 200 | 4 | 360, 12 | 3840, 0, 0 | 0 | 0.980, 0.980 | 0.950, 0.960 | yes |"
    assert [row.count("|") for row in rows] == [10, 10, 10, 10]
    faults = [plan.Fault(0, 1.0, "SIGSTOP actor", "", gone_s=gone, next_step_s=30.0) for gone in (20.0, 24.0, 25.0)]
    faults.append(plan.Fault(0, 1.0, "SIGSTOP actor", ""))
    faults += [
        plan.Fault(0, 1.0, kind, "", next_step_s=1.0, took_effect=False) for kind in ("SIGSTOP actor", "disk full")
    ]
    assert "| SIGSTOP actor | 4, 1 | 24.0 (at most 25.0) | 30.0 (at most 30.0) |" in figures.kind_lines(faults)
    assert "| disk full | 0, 1 |  |  |" in figures.kind_lines(faults)
    assert figures.not_met(faults) == [kind for kind in plan.KINDS if kind != "SIGSTOP actor"]
    assert figures.not_met([plan.Fault(0, 1.0, kind, "") for kind in plan.KINDS]) == []


def test_growth_is_what_was_not_there_or_was_smaller(figures: ModuleType) -> None:
    before = {"/dev/shm": 10.0, "/tmp/ray": 3.0, "/tmp/rl-1": 1.0}
    assert figures.growth(before, {"/dev/shm": 10.9, "/tmp/ray": 3.0}) == []
    assert figures.growth(before, before | {"/dev/shm": 12.0, "/tmp/rl-2": 0.0}) == [
        "left: /tmp/rl-2, 0.0 MiB",
        "grown: /dev/shm, from 10.0 to 12.0 MiB",
    ]


# --- processes and files ---


@pytest.fixture
def child() -> Iterator[Any]:
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code]
        started.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_only_processes_with_the_very_mark_are_found(processes: ModuleType, child: Any) -> None:
    sleep = "import time; print(flush=True); time.sleep(60)"
    own = [child(sleep, STORM_TEST=mark) for mark in ("job-a", "job-a.1", "job-a.12")]
    other = child(sleep, STORM_TEST="job-ab")
    for process in (*own, other):
        process.stdout.readline()  # only then is its environment its own
    assert {each.pid for each in processes.marked("STORM_TEST", "job-a")} == {process.pid for process in own}
    assert {each.pid for each in processes.marked("STORM_TEST", "job-a.1")} == {own[1].pid}
    found = psutil.Process(own[0].pid)
    found.kill()
    while not processes.is_gone(found):  # as a zombie already
        time.sleep(0.01)


def test_a_limit_of_files_is_a_full_disk_until_it_is_lifted(processes: ModuleType, child: Any, tmp_path: Path) -> None:
    code = (
        "import sys\nprint('up', flush=True)\n"
        "def write():\n"
        f"    with open({str(tmp_path / 'file')!r}, 'wb', buffering=0) as file:\n"
        "        for _ in range(4): file.write(bytes(1000))\n"
        "for _ in sys.stdin:\n"
        "    try: write(); print('good', flush=True)\n"
        "    except OSError as error: print(error.strerror, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "up\n"
        told = []
        for limit in (2000, -1):
            processes.limit_files([psutil.Process(process.pid)], limit)
            process.stdin.write("again\n")
            told.append(process.stdout.readline().strip())
        assert told == [os.strerror(27), "good"]  # EFBIG
    finally:
        process.kill()
        process.communicate()


def saved(store: CheckpointStore, version: int) -> Path:
    temporary = store.begin(f"step_{version:06d}")
    (temporary / "policy").mkdir()
    (temporary / "policy" / "model.safetensors").write_bytes(bytes(1000))
    (temporary / "state.json").write_text("{}")
    return store.commit(temporary, f"step_{version:06d}", {"weight_version": version})


@pytest.mark.parametrize("draw", [0.0, 0.4, 0.7, 0.999])
def test_a_flipped_bit_makes_a_checkpoint_invalid_and_leaves_its_hard_links(
    processes: ModuleType, tmp_path: Path, draw: float
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    paths = [saved(store, version) for version in (9, 10)]
    handed = tmp_path / "handed"
    handed.hardlink_to(paths[1] / "policy" / "model.safetensors")
    assert processes.valid_checkpoints(tmp_path) == paths
    assert processes.flip_a_bit(paths[1], draw).split(" of ")[-1].startswith("step_000010/")
    assert processes.valid_checkpoints(tmp_path) == paths[:1]
    assert store.latest() == paths[0]
    assert handed.read_bytes() == bytes(1000)


# --- a job, with a program in the place of rlsys ---

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


# --- the whole command ---

JOB = """
import json, os, signal, sys, time
from pathlib import Path
from rlsys.run.checkpoints import CheckpointStore
folder, weights, do = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
folder.mkdir(parents=True, exist_ok=True)
rows = [{"stage": "online", "step": step, "weights/version": step, "time/step_s": 0.5} for step in (0, 1, 2)]
rows[2] |= {"held_out/greedy_accuracy": 0.9, "held_out/sampled_accuracy": 0.8}
line = {"version": 2, "trained": [0, 1, 2], "filtered": [], "skipped": []}
(folder / "ledger.jsonl").write_text(json.dumps(line) + chr(10))
store = CheckpointStore(folder / "checkpoints", 2)
temporary = store.begin("step_000002")
(temporary / "policy").mkdir()
(temporary / "policy" / "model.safetensors").write_text(weights)
(temporary / "state.json").write_text('{"cursor": 4, "in_flight": [3]}')
store.commit(temporary, "step_000002", {"weight_version": 2})
if "litter" in do:
    (folder / "checkpoints" / ".tmp-x").mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))  # now it may be ended
time.sleep(60 if "wait" in do and os.environ["RLSYS_CHAOS_MARK"].endswith(".0") else 0)
"""


@pytest.fixture
def chaos(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the whole command on jobs that a small program makes; its exit code, its page and its result."""
    found = importlib.import_module("chaos")
    monkeypatch.setattr(modules["storm"], "LOOK_S", 0.02)
    monkeypatch.setattr(found.results_page, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(found.results_page, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(found, "WATCHED", ())
    monkeypatch.setattr(found.signal, "signal", lambda *_: None)

    def run(
        weights: str = "same",
        *do: str,
        kind: str = "SIGTERM driver",
        options: tuple[str, ...] = (),
        fails: bool = False,
    ) -> tuple[int, str, dict[str, Any]]:
        def trained(run_dir: Path, config: Path, overrides: list[str], timeout_s: float) -> float:
            assert "run.seed=0" in overrides and "train.max_steps=2" in overrides and timeout_s >= 600
            made.append(run_dir)
            if fails:
                raise subprocess.TimeoutExpired("rlsys", timeout_s)
            subprocess.run([sys.executable, "-c", JOB, str(run_dir), "same"], check=True)
            return 0.25

        class Job(modules["storm"].JobStorm):  # type: ignore[misc]
            def __init__(self, job: int, run_dir: Path, config: Path, overrides: list[str], *rest: Any) -> None:
                super().__init__(job, run_dir, config, overrides, *rest)
                self._command = [sys.executable, "-c", JOB, str(run_dir), weights, *do]

        injections = itertools.repeat(modules["storm_plan"].Injection(kind, 0.05, 0.5))
        monkeypatch.setattr(found, "schedule", lambda *_: injections)
        monkeypatch.setattr(found, "trained", trained)
        monkeypatch.setattr(found, "JobStorm", Job)
        given = ["--minutes", "0.001", "--folder", str(tmp_path / "runs"), "--write", *options, "train.max_steps=2"]
        monkeypatch.setattr(sys, "argv", ["chaos.py", *given])
        made: list[Path] = []
        code = found.main()
        result = json.loads((tmp_path / "results" / "chaos.json").read_text())
        return code, (tmp_path / "results.md").read_text(), result | {"made": made}

    return run


def test_the_command_compares_a_job_with_its_undisturbed_run(chaos: Any) -> None:
    code, page, result = chaos("same", "wait")
    assert code == 0, page
    assert [fault["kind"] for fault in result["faults"]] == ["SIGTERM driver"]
    assert any("the driver ended: exit code 143" in what for _, what in result["timeline"])
    job = result["jobs"][0]
    assert (job["starts"], job["steps"], job["prompts"], job["prompts_lost"], job["step_s"]) == (2, 2, 4, 0, 1.0)
    assert "## The quickstart in a storm of faults" in page and f"sha256 {job['sha256']}" in page
    assert f"Goodput {0.25 / job['seconds']:.3f}" in page and "0.900, 0.900 | 0.800, 0.800 | yes |" in page


def test_undisturbed_runs_are_made_anew_for_every_storm_unless_a_folder_is_named(chaos: Any, tmp_path: Path) -> None:
    storms = [chaos()[2]["made"] for _ in range(2)]
    assert all(made.parent.parent.parent == tmp_path / "runs" for (made,) in storms)
    assert len({made.parent for (made,) in storms}) == 2
    command = importlib.import_module("chaos")
    asked = [*command.OVERRIDES, "train.max_steps=2", "run.seed=0"]
    (tmp_path / "kept" / "seed-0").mkdir(parents=True)
    known = command.record_of(tmp_path / "new", command.CONFIG, asked)
    (tmp_path / "kept" / "seed-0" / "cell.json").write_text(json.dumps(known))  # of the same settings
    _, page, result = chaos(options=("--undisturbed", str(tmp_path / "kept")))
    assert result["made"] == [tmp_path / "kept" / "seed-0"] and f"reused from {tmp_path / 'kept'}" in page


def test_runs_of_other_settings_are_refused_before_the_storm(chaos: Any, tmp_path: Path) -> None:
    other = tmp_path / "kept" / "seed-3"  # of a job that this storm may come to
    other.mkdir(parents=True)
    (other / "cell.json").write_text('{"asked": ["another config"], "seconds": 1.0, "done": true}')
    with pytest.raises(SystemExit, match="seed-3 was made with other settings"):
        chaos(options=("--undisturbed", str(tmp_path / "kept")))
    assert not (tmp_path / "runs").exists()


def test_a_storm_is_not_lost_with_its_undisturbed_run(chaos: Any) -> None:
    code, page, result = chaos("same", "wait", fails=True)
    assert code == 1 and "- **job 0: its undisturbed run failed**" in page and "- **job 0: no verdict" not in page
    assert result["jobs"][0]["accuracy"] == {"greedy": 0.9, "sampled": 0.8}
    kept = json.loads((result["made"][0].parents[1] / "storm.json").read_text())
    assert kept == {"faults": result["faults"], "timeline": result["timeline"]} and len(kept["faults"]) == 1


def test_the_distance_of_the_faults_is_measured(chaos: Any) -> None:
    _, page, result = chaos("same", "wait")
    assert f"1 faults in {result['jobs'][0]['seconds'] / 60:.1f} minutes" in page
    assert f"one every {result['jobs'][0]['seconds']:.0f} s on average" in page
    assert 'ARGS="--seed 0 --minutes 0.001 --mean 35 train.max_steps=2"' in page
    _, page, result = chaos(kind="SIGKILL actor")  # never there
    assert result["faults"] == [] and ": 0 faults in " in page


def test_kinds_that_never_took_effect_are_named(chaos: Any) -> None:
    code, page, _ = chaos("same", "wait")
    assert code == 0 and "**Faults that never took effect: SIGKILL actor, " in page and ", disk full.**" in page
    assert "SIGTERM driver" not in page.partition("Faults that never took effect")[2]


def test_the_command_fails_where_the_bytes_differ_or_something_is_left(chaos: Any) -> None:
    code, page, _ = chaos("other", "litter")
    assert code == 1
    assert "- **job 0: no verdict was lost and no step skipped, but the last checkpoint has other bytes**" in page
    assert "- **left: " in page and "/checkpoints/.tmp-x, 0.0 MiB**" in page
