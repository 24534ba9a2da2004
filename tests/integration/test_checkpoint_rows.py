"""Rows of the table of faults for checkpoints: all of tests/rlsys/run/test_checkpoint_kills.py, counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from reliability import begin, record
from test_checkpoint_kills import (
    CASES,
    CheckpointStore,
    Saver,
    damage_every_file,
    flipped,
    kill_at_every_call,
    saver,
    store,
    swap_every_two_files,
    truncated,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
__all__ = ["saver", "store"]  # fixtures


def test_killed_at_every_call_of_a_save(saver: Saver, tmp_path: Path) -> None:
    row = begin(
        fault="driver killed at every write of a checkpoint",
        promise="the one before or the new one, never another; the next save works",
        injection="SIGKILL before every call of libc that changes files, and half-way through every write",
    )
    kills = sum(
        kill_at_every_call(saver, tmp_path / f"{number}-{half}", case, half)
        for number, case in enumerate(CASES)
        for half in (False, True)
    )
    record(replace(row, runs=kills, passed=kills))


def test_damaged_in_every_place(
    store: CheckpointStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    row = begin(
        fault="checkpoint damaged",
        promise="found and named; the one before is used",
        injection="every bit of every file turned, every file cut to every size, every two files swapped",
    )
    times = damage_every_file(store, caplog, flipped) + damage_every_file(store, caplog, truncated)
    times += swap_every_two_files(store, caplog)
    record(replace(row, runs=times, passed=times))
