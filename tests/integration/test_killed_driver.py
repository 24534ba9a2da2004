"""SIGKILL of the driver at thirty moments of a run: each time the same command ends where an undisturbed run does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from joint_runs import last_contents
from killed_runs import (
    STEPS,
    Moment,
    check_moments,
    copy_beginning,
    killed_config,
    moments,
    trained_anew,
)
from real_runs import (
    Command,
    FinishedRun,
    commands,
    faults_in,
    last_checkpoint,
    steady_rows,
    write_config,
)
from reliability import begin, lost_and_twice, record

from rlsys.run.metrics import read_rows

MOMENTS = moments()
GONE_S = 15.0


@dataclass(slots=True)
class Killed:
    """Figures of one kill, as far as its test has come.

    gone_s: from the kill until nothing of the run was left. recovery_s: from the start of the next command until its
    first new step, None where there was none to make. steps: logged and not in a checkpoint.
    """

    passed: bool = False
    gone_s: float | None = None
    recovery_s: float | None = None
    steps: int = 0
    lost: int = 0
    twice: int = 0
    left: int = 0


def test_the_moments_are_what_they_should_be() -> None:
    check_moments(MOMENTS)
    assert moments() == MOMENTS


@pytest.fixture(scope="module")
def undisturbed(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every checkpoint kept, for the beginnings of killed runs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with commands() as start:
        config = write_config(folder, killed_config(finished_run))
        start("train", config, f"checkpoint.keep_last={STEPS}").finish().assert_gone(within_s=5)
    return folder / "run"


@pytest.fixture(scope="module")
def killed() -> Iterator[dict[str, Killed]]:
    """By the name of a moment. All together make a row of the table."""
    found: dict[str, Killed] = {}
    row = begin(
        fault="driver killed",
        promise="everything ends with it; the same command goes on to the same weights, moments and metrics",
        injection="SIGKILL at 30 seeded moments of a 12-step run with search, joint objective and critic",
        runs=len(MOMENTS),
    )
    yield found
    every = found.values()
    record(
        replace(
            row,
            passed=sum(each.passed for each in every),
            detection_s=max((each.gone_s for each in every if each.gone_s), default=None),
            recovery_s=max((each.recovery_s for each in every if each.recovery_s), default=None),
            steps_lost=max(each.steps for each in every),
            prompts_lost=sum(each.lost for each in every),
            trained_twice=sum(each.twice for each in every),
            processes_left=sum(each.left for each in every),
        )
    )


@pytest.mark.integration
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_undisturbed_run_has_all_that_a_kill_could_harm(undisturbed: Path) -> None:
    rows = [row for row in read_rows(undisturbed / "metrics.jsonl") if row["step"]]
    assert [row["weights/version"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["search/trees"] > 0 and row["learner/grad_norm"] > 0
    for name in ("preference", "sft", "value", "policy", "kl"):
        assert sum(row[f"objective/{name}_denominator"] > 0 for row in rows) > STEPS // 2, name
    assert rows[-1]["rollout/filtered"] > 0
    contents = {name.split("/")[0] for name in last_contents(undisturbed)}
    assert contents == {"policy", "learner", "critic", "critic_learner", "state.json"}
    assert lost_and_twice(undisturbed) == (0, 0)


@pytest.mark.integration
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.name)
def test_killed_and_resumed_ends_where_an_undisturbed_run_does(
    moment: Moment,
    undisturbed: Path,
    killed: dict[str, Killed],
    finished_run: FinishedRun,
    start: Callable[..., Command],
    tmp_path: Path,
) -> None:
    figures = killed[moment.name] = Killed()
    config, run = write_config(tmp_path, killed_config(finished_run)), tmp_path / "run"
    copy_beginning(undisturbed, run, moment.begins)
    first, died = kill(moment, config, run, tmp_path / "faults.jsonl", start)
    figures.left = wait_for_the_end(first, died)
    assert figures.left == 0
    figures.gone_s = time.monotonic() - died
    saved = version_of_checkpoint(run)
    rows = read_rows(run / "metrics.jsonl")
    logged = rows[-1]["weights/version"] if rows else 0
    assert moment.begins <= saved <= logged <= STEPS
    figures.steps = logged - saved

    anew = trained_anew(run, saved)
    begun = time.monotonic()
    second = start("train", config)
    while second.running and not anew():
        time.sleep(0.02)
    figures.recovery_s = time.monotonic() - begun if saved < STEPS else None
    second.finish().assert_gone(within_s=5)
    folders = first.seen.ray_folders | second.seen.ray_folders
    assert [folder for folder in folders if Path(folder).exists()] == []  # the second has removed those of the first

    assert steady_rows(run) == steady_rows(undisturbed)
    assert last_contents(run) == last_contents(undisturbed)
    assert (run / "ledger.jsonl").read_text() == (undisturbed / "ledger.jsonl").read_text()
    figures.lost, figures.twice = lost_and_twice(run)
    assert (figures.lost, figures.twice) == (0, 0)
    figures.passed = True
    print(f"{moment.name}: {figures}")


def kill(moment: Moment, config: str, run: Path, log: Path, start: Callable[..., Command]) -> tuple[Command, float]:
    """Start the run and let its driver be killed; answers with the time of it."""
    begun = time.monotonic()
    command = start("train", config, environment={"RLSYS_FAULTS": moment.fault, "RLSYS_FAULTS_LOG": str(log)})
    if not moment.fault:
        time.sleep(max(0.0, begun + moment.after_s - time.monotonic()))
        begins = [row["weights/version"] for row in read_rows(run / "metrics.jsonl")]
        died = time.monotonic()
        command.signal(signal.SIGKILL, group=False)
        command.fail(-signal.SIGKILL)
        assert not faults_in(log)
        assert max(begins, default=0) <= moment.begins and "stage online" not in command.stdout  # nothing was trained
        return command, died
    command.fail(-signal.SIGKILL)
    (acted,) = faults_in(log)
    assert f"{acted['point']}:{acted['action']}" == f"{moment.point}:{moment.fault.rpartition(':')[2]}"
    assert (acted["role"] == "driver") == (acted["action"] == "kill9")
    for key, _, value in (item.partition("=") for item in moment.fault.partition("@")[2].rpartition(":")[0].split(",")):
        assert key in ("", "hit") or {**acted, **acted["where"]}[key] == value
    return command, acted["time"]


def wait_for_the_end(command: Command, died: float) -> int:
    """How much of a killed run is left, GONE_S after its death at the latest."""
    while (left := command.left_over()) and time.monotonic() - died < GONE_S:
        time.sleep(0.05)
    return len(left)


def version_of_checkpoint(run: Path) -> int:
    """Weight version of the newest valid checkpoint, 0 where there is none."""
    if not any((run / "checkpoints").glob("step_*")):
        return 0
    return int(last_checkpoint(run).name.removeprefix("step_"))
