"""The storm of `make chaos`: its plan follows from the seed, its figures from what the jobs wrote."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
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
    # The mean of 2000 draws has a standard error of about 1 %.
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
