"""Two commands on one run directory: one runs, the other names it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from real_runs import REPOSITORY, TINY, write_config
from reliability import begin, record

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
RACES = 20
Racer = subprocess.Popen[str]


@pytest.fixture
def racers() -> Iterator[list[Racer]]:
    """Two processes of race_child.py, whose commands stay where they hold the lock of the run directory."""
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("race_child.py"))],
            env={**os.environ, "RLSYS_FAULTS": "driver.start:hang", "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        yield started
    finally:
        for racer in started:
            os.killpg(racer.pid, signal.SIGKILL)  # its command too, where a test has failed
            racer.wait()


def exit_code(racer: Racer) -> int:
    assert racer.stdout
    return int(racer.stdout.readline())


@pytest.mark.parametrize("races", [3, pytest.param(RACES, marks=pytest.mark.long)])
def test_of_two_commands_at_once_one_runs_and_the_other_names_it(
    racers: list[Racer], tmp_path: Path, races: int
) -> None:
    row = races == RACES and begin(
        fault="second driver on one run directory",
        promise="one runs; the other ends in one line that names process and host of the first",
        injection="two commands started at once, on a new directory each time",
        runs=races,
    )
    config, won = write_config(tmp_path, TINY), []
    for race in range(races):
        run = tmp_path / f"run-{race}"
        first, second = racers if race % 2 else reversed(racers)
        errors = {racer: tmp_path / f"errors-{race}-{number}" for number, racer in enumerate(racers)}
        for racer in (first, second):
            assert racer.stdin
            racer.stdin.write(json.dumps(["train", config, f"run.dir={run}", str(errors[racer])]) + "\n")
        pids = {racer: int(racer.stdout.readline()) for racer in racers if racer.stdout}
        [ended], _, _ = select.select([racer.stdout for racer in racers], [], [], 60)
        loser, winner = racers if racers[0].stdout is ended else reversed(racers)
        assert exit_code(loser) == 2
        assert errors[loser].read_text() == (
            f"error: run.dir: {run} is in use by process {pids[winner]} on {socket.gethostname()}; "
            "stop that run or choose another run.dir\n"
        )
        assert json.loads((run / "lock").read_text())["pid"] == pids[winner]
        assert {path.name for path in run.iterdir()} == {"lock"}
        os.kill(pids[winner], signal.SIGKILL)
        assert exit_code(winner) == -signal.SIGKILL  # it was still there
        assert errors[winner].read_text() == ""
        won.append(racers.index(winner))
    if row:
        assert set(won) == {0, 1}, "a race that the same one always wins is none"
        record(replace(row, passed=len(won)))
