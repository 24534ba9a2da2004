"""A run whose driver is killed at a moment drawn by a seed, or stopped, ends exactly where an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reliability
from real_runs import (
    BEGINS,
    WHOLE,
    Command,
    FinishedRun,
    commands,
    digests,
    last_checkpoint,
    steady_rows,
    wait_for_row,
    write_config,
)
from watched_runs import open_to_others

from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# One actor, where the undisturbed run has two: neither a kill nor the number of actors changes a byte.
DISTURBED: dict[str, Any] = {**WHOLE, "actors": {**WHOLE["actors"], "count": 1}}
# Where the driver is killed in the online stage, which makes the versions 61 to 70 with checkpoints at 65 and 70.
# test_killed_driver.py has thirty such moments.
MOMENTS = (
    "driver.rollout@step=8:kill9",
    "learner.backward@role=learner,number=1,version=67:kill_driver",
    "learner.optimizer@role=learner,number=0,version=68:kill_driver",
    "publish.bucket@role=actor,number=0,version=67:kill_driver",
    "checkpoint.rename@version=70:kill9",
)
SEED = os.environ.get("RLSYS_TEST_SEED", "11")


@pytest.fixture(scope="module", params=["killed", pytest.param("stopped and killed", marks=pytest.mark.long)])
def disturbed_run(
    request: pytest.FixtureRequest, finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """SIGKILL of the driver at a drawn moment, and the same command again. Before it Ctrl-C in the online stage.

    The run that is not stopped before begins with what the undisturbed one had at its middle checkpoint.
    """
    folder = tmp_path_factory.mktemp("disturbed")
    config, run = write_config(folder, DISTURBED), folder / "run"
    with commands() as start:
        row, stopped = None, []
        if request.param == "killed":
            copy_until(BEGINS + 5, finished_run.dir, run)
        else:
            row, stopped = stop(start, config, run)
        moment = random.Random(SEED).choice(MOMENTS)
        print(f"RLSYS_TEST_SEED={SEED}: {moment}")
        umask = os.umask(0o022)
        killed = start("train", config, environment={"RLSYS_FAULTS": moment})
        os.umask(umask)
        killed.fail(-signal.SIGKILL)
        killed.assert_gone(within_s=15)
        assert read_rows(run / "metrics.jsonl")[-1]["step"] > 5, moment
        assert last_checkpoint(run).name == "step_000065"

        finished = start("train", config).finish()
        finished.assert_gone(within_s=5)
        # The killed driver could not remove its scratch folder; the next command did.
        commands_run = [*stopped, killed, finished]
        folders = {folder for command in commands_run for folder in command.seen.ray_folders}
        assert len(folders) == len(commands_run)
        assert [folder for folder in folders if Path(folder).exists()] == []
    if row:
        assert steady_rows(run) == steady_rows(finished_run.dir) and digests(run) == digests(finished_run.dir)
        reliability.record(row)
    return run


def copy_until(version: int, undisturbed: Path, run: Path) -> None:
    """Make a run directory as a kill leaves it whose newest checkpoint is that of a version."""
    shutil.copytree(undisturbed, run)
    shutil.rmtree(last_checkpoint(run))
    shutil.rmtree(run / "stages" / "online")
    for name, key in (("metrics.jsonl", "weights/version"), ("ledger.jsonl", "version")):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(line for line in lines if json.loads(line)[key] <= version))


def stop(start: Callable[..., Command], config: str, run: Path) -> tuple[reliability.Row, list[Command]]:
    """It is told to make one step fewer: raising max_steps is how a finished run is continued."""
    promise = "the step under way is finished and saved, exit code 130; the same command ends as if undisturbed"
    row = reliability.begin(fault="Ctrl-C", promise=promise, injection="SIGINT to the command and all it started")
    command = start("train", config, "train.max_steps=9")
    wait_for_row(command, run, "online", 2)
    asked = time.monotonic()
    command.signal(signal.SIGINT, group=True)
    message = command.fail(130)
    took = time.monotonic() - asked
    command.assert_gone(within_s=5)
    assert message.splitlines()[-1] == "stopped by SIGINT; the state is saved, the same command continues"
    last = read_rows(run / "metrics.jsonl")[-1]
    assert last["stage"] == "online" and 2 <= last["step"] < 9
    state = json.loads((last_checkpoint(run) / "state.json").read_text())
    assert (state["weight_version"], state["step"]) == (last["weights/version"], last["step"])
    return replace(row, passed=1, detection_s=took, steps_lost=0, processes_left=0), [command]


def test_metrics_equal_those_of_the_undisturbed_run(disturbed_run: Path, finished_run: FinishedRun) -> None:
    assert steady_rows(disturbed_run) == steady_rows(finished_run.dir)


def test_final_weights_and_moments_equal_byte_for_byte(disturbed_run: Path, finished_run: FinishedRun) -> None:
    found, expected = (digests(run) for run in (disturbed_run, finished_run.dir))
    assert set(expected) == {"policy/model", "learner/exp_avg", "learner/exp_avg_sq"}
    assert found == expected


def test_files_are_their_owners_alone(disturbed_run: Path) -> None:
    assert open_to_others(disturbed_run) == []


def test_tensorboard_shows_every_version_once(disturbed_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(disturbed_run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("rollout/reward")] == list(range(BEGINS + 1, BEGINS + 11))
