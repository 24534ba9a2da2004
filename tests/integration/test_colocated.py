"""Actors and ranks that share devices in turns: the same bytes, and nobody works asleep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import TINY, Command, FinishedRun, digests, steady_rows, write_config

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]


def test_a_colocated_run_ends_with_the_bytes_of_a_spread_one(
    start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    values = {
        **TINY,
        "stages": ["online"],
        "model": {"path": str(finished_run.dir / "stages" / "warm_start")},
        "train": {**TINY["train"], "max_steps": 6},
        "evaluation": {"prompts": 8, "samples": 1, "interval": 2},
    }
    for placement in ("spread", "colocated"):
        (tmp_path / placement).mkdir()
        start("train", write_config(tmp_path / placement, {**values, "placement": placement})).finish()
    spread, colocated = (tmp_path / placement / "run" for placement in ("spread", "colocated"))
    assert digests(colocated) == digests(spread)
    assert steady_rows(colocated) == steady_rows(spread)


def test_a_colocated_run_replaces_an_actor_that_was_lost_while_the_learner_had_its_device(
    start: Callable[..., Command], finished_run: FinishedRun, tmp_path: Path
) -> None:
    values = {
        **TINY,
        "placement": "colocated",
        "stages": ["online"],
        "model": {"path": str(finished_run.dir / "stages" / "warm_start")},
        "train": {**TINY["train"], "max_steps": 6},
        "evaluation": {"prompts": 8, "samples": 1},
    }
    lost = {"RLSYS_FAULTS": "engine.sleep@role=actor,number=1,attempt=0,hit=2:kill9"}
    command = start("train", write_config(tmp_path, values), environment=lost).finish()
    command.said("actor 1 is lost and replaced")
    command.said("actor 1 serves again")
