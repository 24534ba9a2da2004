"""Ray itself is lost: the run ends by name with nothing left, and the same command continues."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from real_runs import (
    WHOLE,
    Command,
    FinishedRun,
    digests,
    last_checkpoint,
    marked,
    row_times,
    steady_rows,
    wait_for_row,
    write_config,
)
from reliability import begin, lost_and_twice, record

from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
KNOWN_S = 75.0  # the services of Ray look for one another for a minute
SERVICES = {"raylet": "Ray's raylet killed", "gcs_server": "Ray's GCS killed"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_run_that_loses_ray_ends_and_the_same_command_continues(
    service: str, start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    row = begin(
        fault=SERVICES[service],
        promise="the run ends and names it, nothing is left, and the same command continues",
        injection="SIGKILL",
    )
    config, run = write_config(tmp_path, WHOLE), tmp_path / "run"
    first = start("train", config)
    wait_for_row(first, run, "online", 2)
    began = time.monotonic()
    process_of(first, service).kill()
    while first.running and time.monotonic() - began < KNOWN_S:
        time.sleep(0.05)
    assert not first.running, f"after {KNOWN_S:.0f} s the run has not noticed\n{first.stdout}\n{first.stderr}"
    known = time.monotonic()
    errors = first.fail(1)
    first.assert_gone(within_s=5)
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and service in last and "Traceback" not in errors, errors
    saved = int(last_checkpoint(run).name.removeprefix("step_"))
    lost = read_rows(run / "metrics.jsonl")[-1]["weights/version"] - saved

    begun = time.monotonic()
    with row_times(run) as versions:
        start("train", config).finish().assert_gone(within_s=5)
    again = next(at for (_, before), (at, version) in itertools.pairwise(versions) if version > before)
    assert steady_rows(run) == steady_rows(finished_run.dir)
    assert digests(run) == digests(finished_run.dir)
    prompts_lost, twice = lost_and_twice(run)
    assert (prompts_lost, twice) == (0, 0)
    record(
        replace(
            row,
            passed=1,
            detection_s=known - began,
            recovery_s=again - begun,
            steps_lost=lost,
            prompts_lost=prompts_lost,
            trained_twice=twice,
            processes_left=0,
        )
    )
    print(service, known - began, again - begun, lost, last)


def process_of(command: Command, service: str) -> psutil.Process:
    (found,) = (process for process in marked(command.mark) if process.name() == service)
    return found
