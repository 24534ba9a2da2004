"""Steps that are not finite, saves that fail and a time limit, on the real stack."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from real_runs import (
    TINY,
    WHOLE,
    Command,
    FinishedRun,
    digests,
    last_checkpoint,
    steady_rows,
    wait_for_row,
    write_config,
)
from reliability import begin, lost_and_twice, record

from rlsys.run.ledger import read_ledger
from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]

# The online stage makes the versions 61 to 70, in two updates each; checkpoints are at 65 and 70. Of three faults in a
# row the first spoils a loss on one rank, the second a gradient on the other one, in the second update.
BAD_STEPS = (
    "learner.loss@role=learner,number=1,version=62,hit=1:nan",
    "learner.gradient@role=learner,number=0,version=63,hit=2:nan",
    "checkpoint.learner@role=learner,number=0,hit=2:full",
)


def test_bad_steps_are_skipped_and_a_failed_save_is_survived(start: Callable[..., Command], tmp_path: Path) -> None:
    bad = begin(
        fault="loss or gradient not finite on one rank",
        promise="the step is skipped on all ranks; the next prompts take the place of its own, which the ledger names",
        injection="learner.loss and learner.gradient: nan, first and second update",
        runs=2,
    )
    full = begin(
        fault="disk full in a save",
        promise="named, no part of it stays, training goes on, the next save works",
        injection="checkpoint.learner: full, on one rank",
    )
    command = start("train", write_config(tmp_path, TINY), environment={"RLSYS_FAULTS": ";".join(BAD_STEPS)}).finish()
    command.assert_gone(within_s=5)
    run = tmp_path / "run"
    said = (command.stdout + command.stderr).splitlines()
    skipped = [line for line in said if line.startswith("STEP SKIPPED: ")]
    assert len(skipped) == 2, said
    assert len([line for line in said if line.startswith("SAVE FAILED, training goes on: ")]) == 1, said
    rows = {row["weights/version"]: row for row in read_rows(run / "metrics.jsonl") if row["stage"] == "online"}
    assert [rows[version]["learner/skipped_steps"] for version in (61, 62, 63, 70)] == [0, 1, 2, 2]
    assert rows[70]["process/failed_saves"] == 1
    lines = {line["version"]: line for line in read_ledger(run / "ledger.jsonl")}
    assert [len(lines[version]["skipped"]) for version in (61, 62, 63, 64)] == [0, 8, 8, 0]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000065", "step_000070"]
    lost, twice = lost_and_twice(run)
    assert (lost, twice) == (0, 0)
    left = len(command.left_over())
    record(replace(bad, passed=2, steps_lost=len(skipped), prompts_lost=lost, trained_twice=twice, processes_left=left))
    record(replace(full, passed=1, steps_lost=0, prompts_lost=lost, trained_twice=twice, processes_left=left))


def test_too_many_bad_steps_take_the_run_back_once_and_then_end_it(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    row = begin(
        fault="more steps in a row not finite than learner.max_skipped_steps",
        promise="once back to the newest checkpoint with new ranks, then the end by name; the command continues",
        injection="learner.loss: nan, in every step from a version on",
    )
    config = write_config(tmp_path, {**TINY, "learner": {**TINY["learner"], "max_skipped_steps": 1}})
    faults = "learner.loss@role=learner,number=1,version=67:nan"
    command = start("train", config, environment={"RLSYS_FAULTS": faults})
    message = command.fail(1)
    assert "the same happened before the return to the newest checkpoint" in message
    returns = [line for _, line in command.lines if "the learner is lost and started again" in line]
    assert len(returns) == 1 and "step_000065 (weight version 65)" in returns[0]
    assert "2 training steps in a row were not finite, more than learner.max_skipped_steps = 1" in message
    assert message.count("Traceback") == 0
    # What made them bad is gone: the same command goes on from the last good checkpoint.
    again = start("train", config).finish()
    assert "step_000065 (weight version 65)" in again.stdout
    again.assert_gone(within_s=5)
    lost, twice = lost_and_twice(tmp_path / "run")
    assert (lost, twice) == (0, 0)
    record(replace(row, passed=1, prompts_lost=lost, trained_twice=twice, processes_left=len(again.left_over())))


def test_a_run_that_is_told_to_stop_saves_and_the_same_command_continues(
    start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    """By SIGTERM to the group of the driver, then by its time limit, then to the end."""
    promise = "the step under way is finished, a checkpoint, exit code {}, the same command continues to the same bytes"
    told = begin(fault="SIGTERM", promise=promise.format(143), injection="SIGTERM to the driver's group, stage online")
    over = begin(
        fault="the job's time is over (run.time_limit)",
        promise=promise.format(75),
        injection="run.time_limit=120, while an actor hangs",
    )
    config, run = write_config(tmp_path, WHOLE), tmp_path / "run"
    first = start("train", config)
    wait_for_row(first, run, "online", 2)
    began = time.monotonic()
    first.signal(signal.SIGTERM, group=True)  # as `timeout` and batch systems send it
    last = stopped(first, run, 143, "SIGTERM")
    told = replace(told, detection_s=first.said("SIGTERM: stopping after what is under way")[0] - began)
    assert 2 <= last < 9

    hanging = {"RLSYS_FAULTS": "generate@role=actor,number=0,hit=2:hang"}  # the time is over in the online stage
    second = start("train", config, "run.time_limit=120", environment=hanging)
    assert last < stopped(second, run, 75, "run.time_limit") < 10

    start("train", config).finish()
    assert steady_rows(run) == steady_rows(finished_run.dir)
    assert digests(run) == digests(finished_run.dir)
    lost, twice = lost_and_twice(run)
    assert (lost, twice) == (0, 0)
    for row, command in ((told, first), (over, second)):
        left = len(command.left_over())
        record(replace(row, passed=1, steps_lost=0, prompts_lost=lost, trained_twice=twice, processes_left=left))


def stopped(command: Command, run: Path, code: int, by: str) -> int:
    """The step at which a command has ended by `code`; everything up to it is saved."""
    message = command.fail(code)
    assert message.splitlines()[-1] == f"stopped by {by}; the state is saved, the same command continues"
    command.assert_gone(within_s=5)
    last = read_rows(run / "metrics.jsonl")[-1]
    assert last["stage"] == "online"
    assert last_checkpoint(run).name == f"step_{last['weights/version']:06d}"
    return int(last["step"])
