"""Lost actors and ranks are replaced within the run, which then ends exactly where an undisturbed one does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import TINY, Command, FinishedRun, last_checkpoint, steady_rows, write_config

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]

# The online stage makes the versions 61 to 70. Two dispatches are those of the evaluation before it.
FAULTS = (
    "generate@role=actor,number=1,attempt=0,hit=4:kill9",
    "generate@role=actor,number=1,attempt=1,hit=2:stop",
    "publish.bucket@role=actor,number=0,attempt=0,version=67:kill9",
)


def test_a_run_that_loses_three_actors_ends_where_an_undisturbed_one_does(
    start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    config = write_config(tmp_path, {**TINY, "actors": {**TINY["actors"], "hang_timeout_s": 15}})
    command = start("train", config, environment={"RLSYS_FAULTS": ";".join(FAULTS)}).finish()
    command.assert_gone(within_s=5)
    said = [line for line in (command.stdout + command.stderr).splitlines() if "actor" in line]
    lost = [line.split(":")[0] for line in said if "is lost" in line]
    # The run goes on with the other actor while one is replaced, so that one may be lost at any time of these.
    assert sorted(lost) == ["actor 0 is lost and replaced", *["actor 1 is lost and replaced"] * 2], said
    assert any("made no progress within actors.hang_timeout_s = 15.0 s" in line for line in said)
    assert steady_rows(tmp_path / "run") == steady_rows(finished_run.dir)
    assert digests(tmp_path / "run") == digests(finished_run.dir)


LOST_RANKS = (
    "learner.step@role=learner,number=1,attempt=0,version=63:kill9",
    "learner.update@role=learner,number=0,attempt=1,hit=14:stop",  # of two updates a step: in that of version 67
)


def test_a_run_that_loses_its_learner_twice_ends_where_an_undisturbed_one_does(
    start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    learner = {**TINY["learner"], "hang_timeout_s": 15}
    config = write_config(tmp_path, {**TINY, "learner": learner})
    command = start("train", config, environment={"RLSYS_FAULTS": ";".join(LOST_RANKS)}).finish()
    command.assert_gone(within_s=5)
    said = [line for line in (command.stdout + command.stderr).splitlines() if "the learner is lost" in line]
    assert "learner rank 1 died: " in said[0] and "step_000060 (weight version 60)" in said[0]
    assert "made no progress within learner.hang_timeout_s = 15.0 s" in said[1]
    assert "step_000065 (weight version 65)" in said[1] and len(said) == 2
    assert steady_rows(tmp_path / "run") == steady_rows(finished_run.dir)
    assert digests(tmp_path / "run") == digests(finished_run.dir)


def digests(run: Path) -> dict[str, str]:
    folder = last_checkpoint(run)
    files = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
