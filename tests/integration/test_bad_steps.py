"""Steps that are not finite, saves that fail and a time limit, on the real stack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import TINY, Command, FinishedRun, last_checkpoint, steady_rows, write_config
from reliability import Row, lost_and_twice, record
from test_lost_processes import digests

from rlsys.ledger import read_ledger
from rlsys.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]

# The online stage makes the versions 61 to 70, in two updates each; checkpoints are at 65 and 70. Of three faults in a
# row the first spoils a loss on one rank, the second a gradient on the other one, in the second update.
BAD_STEPS = (
    "learner.loss@role=learner,number=1,version=62,hit=1:nan",
    "learner.gradient@role=learner,number=0,version=63,hit=2:nan",
    "checkpoint.learner@role=learner,number=0,hit=2:full",
)


def test_bad_steps_are_skipped_and_a_failed_save_is_survived(start: Callable[..., Command], tmp_path: Path) -> None:
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
    lost, twice = lost_and_twice(run)
    assert (lost, twice) == (0, 0)
    record(
        Row(
            fault="loss or gradient not finite on one rank",
            promise="the step is skipped on all ranks, nothing is published",
            injection="learner.loss and learner.gradient: nan, first and second update",
            runs=2,
            passed=len(skipped),
            steps_lost=0,
            prompts_lost=lost,
            trained_twice=twice,
            processes_left=len(command.left_over()),
        )
    )


def test_too_many_bad_steps_take_the_run_back_once_and_then_end_it(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    config = write_config(tmp_path, {**TINY, "learner": {**TINY["learner"], "max_skipped_steps": 1}})
    faults = "learner.loss@role=learner,number=1,version=67:nan"
    message = start("train", config, environment={"RLSYS_FAULTS": faults}).fail(1)
    assert "2 training steps in a row were not finite, more than learner.max_skipped_steps = 1" in message
    assert message.count("Traceback") == 0
    # What made them bad is gone: the same command goes on from the last good checkpoint.
    again = start("train", config).finish()
    assert "step_000065 (weight version 65)" in again.stdout
    again.assert_gone(within_s=5)


def test_a_run_whose_time_is_over_saves_and_the_same_command_continues(
    start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path, TINY), tmp_path / "run"
    hanging = {
        "RLSYS_FAULTS": "generate@role=actor,number=0,hit=6:hang"
    }  # so that the time is over in the online stage
    first = start("train", config, "run.time_limit=100", environment=hanging)
    message = first.fail(75)
    assert message.splitlines()[-1] == "stopped by run.time_limit; the state is saved, the same command continues"
    first.assert_gone(within_s=5)
    last = read_rows(run / "metrics.jsonl")[-1]
    assert last["stage"] == "online" and 0 < last["step"] < 10
    assert last_checkpoint(run).name == f"step_{last['weights/version']:06d}"
    start("train", config).finish()
    assert steady_rows(run) == steady_rows(finished_run.dir)
    assert digests(run) == digests(finished_run.dir)
    lost, twice = lost_and_twice(run)
    assert (lost, twice) == (0, 0)
    row = Row(
        fault="the job's time is over (run.time_limit)",
        promise="a checkpoint, exit code 75, the same command continues to the same bytes",
        injection="run.time_limit=100, while an actor hangs",
        runs=1,
        passed=1,
        steps_lost=0,
        prompts_lost=lost,
        trained_twice=twice,
        processes_left=len(first.left_over()),
    )
    record(row)
