"""Training with an environment of the user: a killed run ends with the same bytes, and failures are counted."""

from __future__ import annotations

import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from failing_game import TASK, game_section
from real_runs import TINY, digests, steady_rows, wait_for_row, write_config

from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1200)]

STEPS, INTERVAL = 6, 2


def config(folder: Path) -> dict[str, Any]:
    return {
        **TINY,
        "task": TASK,
        "environment": game_section(folder, 6),
        "train": {**TINY["train"], "max_steps": STEPS, "max_verifier_failures": 0.5},
        "checkpoint": {"interval": INTERVAL},
    }


def test_a_killed_run_with_an_environment_ends_with_the_same_bytes(start: Any, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    values = config(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start("train", write_config(whole, values)).finish()
    rows = [row for row in read_rows(whole / "run" / "metrics.jsonl") if row["stage"] == "online" and row["step"]]
    assert len(rows) == STEPS
    assert all(1 < row["rollout/turns"] <= 6 and 0 < row["rollout/environment_share"] < 1 for row in rows)
    assert all(row["rewards/environment"] < 0 for row in rows)
    failed = [row["rollout/environment_errors"] for row in rows]
    assert sum(failed) > 0 and failed == [row["rollout/verifier_errors"] for row in rows]
    assert "held_out/greedy_accuracy" in rows[-1]

    command = start("train", write_config(killed, values))
    wait_for_row(command, killed / "run", "online", INTERVAL + 1)
    command.signal(signal.SIGKILL, group=False)
    command.fail(-signal.SIGKILL)
    command.assert_gone(within_s=15)
    start("train", str(killed / "config.yaml")).finish().assert_gone(within_s=5)
    assert steady_rows(killed / "run") == steady_rows(whole / "run")
    assert digests(killed / "run") == digests(whole / "run")


@pytest.mark.parametrize(("name", "steps", "rise"), [("sums_calculator", 10, 0.4), ("guess", 30, 0.02)])
def test_rewards_rise_in_the_environments_that_ship(
    name: str, steps: int, rise: float, start: Any, tmp_path: Path
) -> None:
    config = str(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    start("train", config, f"run.dir={tmp_path / 'run'}", f"train.max_steps={steps}", "evaluation.prompts=64").finish()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["rollout/reward"] for row in rows if row["stage"] == "online" and row["step"]]
    assert len(rewards) == steps
    part = steps // 4
    assert fmean(rewards[-part:]) - fmean(rewards[:part]) > rise, rewards


def test_replies_may_be_messages_of_the_chat_template(start: Any, tmp_path: Path) -> None:
    values = {
        **TINY,
        "task": TASK,
        "environment": {"role": "user", "max_turns": 6},
        "train": {**TINY["train"], "max_steps": 2},
        "evaluation": {"prompts": 8, "samples": 1},
    }
    command = start("train", write_config(tmp_path, values)).finish()
    assert "environment guess: answers after the end token, as messages of the role user, at most 6 turns" in (
        command.stdout + command.stderr
    )
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "online" and row["step"]]
    assert [row["rollout/environment_errors"] for row in rows] == [0, 0]
    assert all(1 < row["rollout/turns"] <= 6 and row["rollout/accuracy"] > 0.2 for row in rows)
