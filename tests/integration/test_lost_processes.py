"""Lost actors, ranks and verifiers are replaced within the run, which then ends where an undisturbed one does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_runs import (
    TINY,
    TREES,
    WHOLE,
    Command,
    FinishedRun,
    commands,
    digests,
    faults_in,
    marked,
    row_times,
    steady_rows,
    wait_for_row,
    write_config,
)
from reliability import begin, lost_and_twice, record

from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
HANG_S = 15
REPLACED = "it is replaced and asked again; the run ends with the same bytes"

# What happens to which process, in pairs that come at about the same time. The run waits where nobody serves, so that
# its steps last until all of them have come. An engine gets a publish in four or more buckets.
FAULTS = {
    "actor killed in generation": "generate@role=actor,number=1,attempt=0,hit=4:kill9",
    "actor killed in search": "search@role=actor,number=0,attempt=0,hit=3:kill9",
    "actor stopped in generation": "generate@role=actor,number=1,attempt=1,hit=2:stop",
    "actor stopped in search": "search@role=actor,number=0,attempt=1,hit=3:stop",
    "actor killed in a publish": "publish.bucket@role=actor,number=1,attempt=2,hit=7:kill9",
    "actor stopped in a publish": "publish.bucket@role=actor,number=0,attempt=2,hit=7:stop",
    "engine took a publish without a tensor": "publish.drop@role=actor,number=1,attempt=3:lm_head.weight",
}


def losing(warmed_up: FinishedRun) -> dict[str, Any]:
    """Half of the prompts are searched."""
    return {
        **TINY,
        "stages": ["online"],
        "model": {"path": str(warmed_up.dir / "stages" / "warm_start")},
        "actors": {**TINY["actors"], "hang_timeout_s": HANG_S},
        "sampling": {"max_tokens": 60},
        "search": {**TREES, "expansion": "chain", "fraction": 0.5},
        "learner": {"ranks": 1},
        # Enough steps for the last replacement to serve before the end, also on a busy machine.
        "train": {**TINY["train"], "max_steps": 60},
        "weight_sync": {"bucket_mib": 0.1},
        "checkpoint": {"interval": 20},
        "evaluation": {"prompts": 8, "samples": 1},
    }


@pytest.fixture(scope="module")
def undisturbed(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with commands() as start:
        start("train", write_config(folder, losing(finished_run))).finish()
    return folder / "run"


def test_a_run_that_loses_its_actors_again_and_again_ends_where_an_undisturbed_one_does(
    start: Callable[..., Command], undisturbed: Path, finished_run: FinishedRun, tmp_path: Path
) -> None:
    ways = {"kill9": "SIGKILL", "stop": "SIGSTOP"}
    rows = {
        fault: begin(
            fault=fault, promise=REPLACED, injection=ways.get(text.rpartition(":")[2], "lm_head.weight is left out")
        )
        for fault, text in FAULTS.items()
    }
    run, log = tmp_path / "run", tmp_path / "faults.jsonl"
    environment = {"RLSYS_FAULTS": ";".join(FAULTS.values()), "RLSYS_FAULTS_LOG": str(log)}
    with row_times(run) as versions:
        command = start("train", write_config(tmp_path, losing(finished_run)), environment=environment).finish()
    command.assert_gone(within_s=5)
    assert [version for _, version in versions] == sorted(version for _, version in versions)  # no step was lost
    assert steady_rows(run) == steady_rows(undisturbed)
    assert digests(run) == digests(undisturbed)
    assert (run / "ledger.jsonl").read_text() == (undisturbed / "ledger.jsonl").read_text()
    lost, twice = lost_and_twice(run)
    assert (lost, twice) == (0, 0)
    acted: dict[tuple[str, str], float] = {}
    for entry in faults_in(log):  # a tensor may be looked for in several buckets: the first counts
        acted.setdefault((entry["number"], entry["attempt"]), entry["time"])
    for fault, text in FAULTS.items():
        keys = dict(item.split("=") for item in text.partition("@")[2].rpartition(":")[0].split(","))
        number, attempt = keys["number"], keys["attempt"]
        assert (number, attempt) in acted, f"{text} did not act"
        began = acted.pop((number, attempt))
        known, line = command.said(f"actor {number} is lost and replaced", after=began)
        back, _ = command.said(f"actor {number} serves again", after=known)
        stopped = f"made no progress within actors.hang_timeout_s = {HANG_S:.1f} s"
        assert (stopped in line) == text.endswith(":stop"), line
        assert ("lm_head" in line) == text.endswith("lm_head.weight"), line
        assert known - began < HANG_S or text.endswith(":stop")  # otherwise it was found by its silence
        record(
            replace(
                rows[fault],
                passed=1,
                detection_s=known - began,
                recovery_s=back - began,
                steps_lost=0,
                prompts_lost=lost,
                trained_twice=twice,
                processes_left=0,
            )
        )
        print(fault, known - began, back - began)
    assert not acted


# The online stage makes the versions 61 to 70, with checkpoints of 60, 65 and 70.
LOST_RANKS = {
    "learner rank killed in the backward pass": "learner.backward@role=learner,number=1,attempt=0,version=63:kill9",
    # Of two updates a step: in that of version 67.
    "learner rank stopped": "learner.update@role=learner,number=0,attempt=1,hit=14:stop",
    "learner rank killed in a publish": "learner.export@role=learner,number=0,attempt=2,version=68:kill9",
}
HUNG = f"made no progress within learner.hang_timeout_s = {HANG_S:.1f} s"
SAYS = ("learner rank 1 died: ", HUNG, "learner rank 0 died: ")


def test_a_run_that_loses_its_learner_three_times_ends_where_an_undisturbed_one_does(
    start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    promise = "all ranks start again from the newest checkpoint; the run ends with the same bytes"
    rows = [
        begin(fault=fault, promise=promise, injection="SIGKILL" if text.endswith("kill9") else "SIGSTOP")
        for fault, text in LOST_RANKS.items()
    ]
    run, log = tmp_path / "run", tmp_path / "faults.jsonl"
    config = write_config(tmp_path, {**WHOLE, "learner": {**WHOLE["learner"], "hang_timeout_s": HANG_S}})
    environment = {"RLSYS_FAULTS": ";".join(LOST_RANKS.values()), "RLSYS_FAULTS_LOG": str(log)}
    with row_times(run) as versions:
        command = start("train", config, environment=environment).finish()
    command.assert_gone(within_s=5)
    lines = [(at, line) for at, line in command.lines if "the learner is lost" in line]
    acted = faults_in(log)
    assert len(lines) == len(acted) == len(rows)
    assert steady_rows(run) == steady_rows(finished_run.dir)
    assert digests(run) == digests(finished_run.dir)
    assert (run / "ledger.jsonl").read_text() == (finished_run.dir / "ledger.jsonl").read_text()
    lost, twice = lost_and_twice(run)
    assert (lost, twice) == (0, 0)
    for row, entry, (known, line), says, saved in zip(rows, acted, lines, SAYS, (60, 65, 65), strict=True):
        assert says in line and f"step_{saved:06d} (weight version {saved})" in line
        newest = max(version for at, version in versions if at < known)
        again = next(at for at, version in versions if at > known and version > saved)
        record(
            replace(
                row,
                passed=1,
                detection_s=known - entry["time"],
                recovery_s=again - entry["time"],
                steps_lost=newest - saved,
                prompts_lost=lost,
                trained_twice=twice,
                processes_left=0,
            )
        )
        print(row.fault, known - entry["time"], again - entry["time"], newest - saved)


def test_ranks_that_die_while_an_actor_takes_their_weights(
    start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    """The actor is stopped between two buckets, the ranks that hold the others are killed, and it goes on."""
    row = begin(
        fault="learner killed while an actor takes its weights",
        promise="all ranks start again from the newest checkpoint; the run ends with the same bytes",
        injection="SIGSTOP of the actor within a publish, SIGKILL of all ranks, SIGCONT",
    )
    run, log = tmp_path / "run", tmp_path / "faults.jsonl"
    config = write_config(tmp_path, {**WHOLE, "weight_sync": {"bucket_mib": 0.05}})
    point = "publish.bucket@role=actor,number=1,attempt=0,version=67,hit=1:stop"
    with row_times(run) as versions:
        command = start("train", config, environment={"RLSYS_FAULTS": point, "RLSYS_FAULTS_LOG": str(log)})
        while not (acted := faults_in(log)):
            assert command.running, command.stdout + command.stderr
            time.sleep(0.05)
        ranks = [process for process in marked(command.mark) if "LearnerActor" in " ".join(process.cmdline())]
        assert len(ranks) == 2
        killed = time.monotonic()
        for rank in ranks:
            rank.kill()
        time.sleep(1.0)  # for Ray to know
        os.kill(acted[0]["pid"], signal.SIGCONT)
        command.finish().assert_gone(within_s=5)
    known, line = command.said("the learner is lost", after=killed)
    assert "step_000065 (weight version 65)" in line
    again = next(at for at, version in versions if at > known and version > 65)
    assert steady_rows(run) == steady_rows(finished_run.dir)
    assert digests(run) == digests(finished_run.dir)
    lost, twice = lost_and_twice(run)
    assert (lost, twice) == (0, 0)
    figures = {"detection_s": known - killed, "recovery_s": again - killed, "steps_lost": 1, "processes_left": 0}
    record(replace(row, passed=1, prompts_lost=lost, trained_twice=twice, **figures))
    print(line, figures)


TIMEOUT_S = 16  # within which a verifier that is stopped gets an answer: a step takes a second or two


def test_a_run_goes_on_with_new_verifiers(start: Callable[..., Command], tmp_path: Path) -> None:
    """One is stopped, then another one killed in a verification; each costs the verdict of the answer it had."""
    promise = "the actor replaces it; the answer it had counts as not judged and trains nothing"
    rows_of = {
        fault: begin(fault=fault, promise=promise, injection=f"SIG{how}")
        for fault, how in (("reward worker stopped", "STOP"), ("reward worker killed in a verification", "KILL"))
    }
    run = tmp_path / "run"
    config = write_config(tmp_path, {**TINY, "rewards": {"timeout_s": TIMEOUT_S}})
    figures = {}
    with row_times(run) as versions:
        command = start("train", config)
        for fault, step, action in (
            ("reward worker stopped", 2, signal.SIGSTOP),
            ("reward worker killed in a verification", 5, signal.SIGKILL),
        ):
            wait_for_row(command, run, "online", step)
            figures[fault] = hit_verifier(command, action, versions)
    command.finish().assert_gone(within_s=5)
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "online" and row["step"]]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert sum(row["rollout/verifier_errors"] for row in rows) == len(figures)
    assert [row["process/actor_restarts"] for row in rows] == [0] * 10
    lost, twice = lost_and_twice(run)
    assert (lost, twice) == (0, 0)
    for fault, (detection_s, recovery_s) in figures.items():
        record(
            replace(
                rows_of[fault],
                passed=1,
                detection_s=detection_s,
                recovery_s=recovery_s,
                steps_lost=0,
                prompts_lost=lost,
                trained_twice=twice,
                processes_left=0,
            )
        )
        print(fault, detection_s, recovery_s)


def hit_verifier(command: Command, action: signal.Signals, versions: list[tuple[float, int]]) -> tuple[float, float]:
    """Lose a verifier while it has an answer to judge.

    One that is stopped is given an answer soon, for the steps of the run need them. Where it is to be killed, it is
    stopped just before, and killed when the run has waited for it.

    Returns:
        Seconds until there is a new one in its place, and until the next step.
    """
    victim = verifiers(command)[0]
    others = {process.pid for process in verifiers(command)}
    began = time.monotonic()
    victim.suspend()
    if action == signal.SIGKILL:
        time.sleep(TIMEOUT_S / 2)
        began = time.monotonic()
        victim.kill()
    while not {process.pid for process in verifiers(command)} - others:
        assert command.running and time.monotonic() < began + 60, command.stdout + command.stderr
        time.sleep(0.05)
    known, step = time.monotonic(), versions[-1][1]
    while versions[-1][1] == step:
        assert command.running, command.stdout + command.stderr
        time.sleep(0.02)
    return known - began, time.monotonic() - began


def verifiers(command: Command) -> list[psutil.Process]:
    """The processes that judge, of all actors; each is below one that watches it."""
    found: dict[int, psutil.Process] = {}
    for process in marked(command.mark):
        if process.name().startswith("ray::RolloutActor") or "ray::RolloutActor" in " ".join(process.cmdline()[:1]):
            below = [child for child in process.children(recursive=True) if is_verifier(child)]
            parents = {child.ppid() for child in below}
            found |= {child.pid: child for child in below if child.pid not in parents}
    return list(found.values())


def is_verifier(process: psutil.Process) -> bool:
    try:
        return "actors.verifiers.worker" in process.cmdline()
    except psutil.NoSuchProcess:
        return False
