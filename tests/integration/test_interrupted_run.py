"""A run that is stopped twice ends exactly where an undisturbed one does. The second time is drawn by a seed."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from real_runs import TINY, FinishedRun, commands, digests, last_checkpoint, steady_rows, wait_for_row, write_config

from rlsys.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# Where the driver is killed in the online stage, which makes the versions 61 to 70 with checkpoints at 65 and 70.
# test_killed_driver.py has thirty such moments.
MOMENTS = (
    "driver.rollout@step=8:kill9",
    "learner.backward@role=learner,number=1,version=67:kill_driver",
    "learner.optimizer@role=learner,number=0,version=68:kill_driver",
    "publish.bucket@role=actor,number=1,version=67:kill_driver",
    "checkpoint.rename@version=70:kill9",
)
SEED = os.environ.get("RLSYS_TEST_SEED", "11")


@pytest.fixture(scope="module")
def disturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ctrl-C in the online stage, then SIGKILL of the driver at a drawn moment, then to the end: the same command.

    The first is told to make one step fewer: raising max_steps is how a finished run is continued.
    """
    folder = tmp_path_factory.mktemp("disturbed")
    config, run = write_config(folder, TINY), folder / "run"
    with commands() as start:
        first = start("train", config, "train.max_steps=9")
        wait_for_row(first, run, "online", 2)
        first.signal(signal.SIGINT, group=True)
        message = first.fail(130)
        first.assert_gone(within_s=5)
        assert message.splitlines()[-1] == "stopped by SIGINT; the state is saved, the same command continues"
        last = read_rows(run / "metrics.jsonl")[-1]
        assert last["stage"] == "online" and 2 <= last["step"] < 9
        state = json.loads((last_checkpoint(run) / "state.json").read_text())
        assert (state["weight_version"], state["step"]) == (last["weights/version"], last["step"])

        moment = random.Random(SEED).choice(MOMENTS)
        print(f"RLSYS_TEST_SEED={SEED}: {moment}")
        second = start("train", config, environment={"RLSYS_FAULTS": moment})
        second.fail(-signal.SIGKILL)
        second.assert_gone(within_s=15)
        assert read_rows(run / "metrics.jsonl")[-1]["step"] > 5, moment
        assert last_checkpoint(run).name == "step_000065"

        third = start("train", config).finish()
        third.assert_gone(within_s=5)
        # The killed driver could not remove its scratch folder; the next command did.
        folders = {folder for command in (first, second, third) for folder in command.seen.ray_folders}
        assert len(folders) == 3 and [folder for folder in folders if Path(folder).exists()] == []
        return run


def test_metrics_equal_those_of_the_undisturbed_run(disturbed_run: Path, finished_run: FinishedRun) -> None:
    assert steady_rows(disturbed_run) == steady_rows(finished_run.dir)


def test_final_weights_and_moments_equal_byte_for_byte(disturbed_run: Path, finished_run: FinishedRun) -> None:
    found, expected = (digests(run) for run in (disturbed_run, finished_run.dir))
    assert set(expected) == {"policy/model", "learner/exp_avg", "learner/exp_avg_sq"}
    assert found == expected


def test_tensorboard_shows_every_version_once(disturbed_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(disturbed_run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("rollout/reward")] == list(range(61, 71))
