"""Rewards, estimator, loss and values of nodes of the user's own in one real run; and wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from joint_runs import online, rows_of
from real_runs import TREES, Command, FinishedRun, commands, write_config

from rlsys.plugins import FOLDER

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]

PARTS = '''
"""my_parts.py"""


def brevity(completions, **columns):
    return [-len(text) / 1000 for text in completions]


def max_baseline(rewards):
    return rewards - rewards.max()


def z_loss(logprobs, *, weights, **tokens):
    return (weights * logprobs.square()).sum()


def short_chains(completions, **columns):
    return [max(0.0, 1 - len(text) / 200) for text in completions]


def wrong(completions, **columns):
    return 0.0
'''


def own(pupil: FinishedRun, **sections: Any) -> dict[str, Any]:
    return online(
        pupil,
        2,
        search={
            **TREES,
            "expansion": "chain",
            "fraction": 0.5,
            "value": {"type": "function", "fn": "my_parts.py:short_chains"},
        },
        rewards={"functions": [{"fn": "my_parts.py:brevity", "weight": 0.5}, {"fn": "format", "weight": 0.1}]},
        objective={
            "policy": {"estimator": "my_parts.py:max_baseline"},
            "custom": {"weight": 0.01, "fn": "my_parts:z_loss"},
        },
        **sections,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_parts.py").write_text(PARTS)
    return tmp_path


def train(start: Any, folder: Path, config: dict[str, Any]) -> Command:
    """Start a run as if the command had been given in the folder of the functions."""
    command: Command = start("train", write_config(folder, config), environment={FOLDER: str(folder)})
    return command


def test_all_functions_in_one_step(finished_run: FinishedRun, folder: Path) -> None:
    with commands() as start:
        train(start, folder, own(finished_run)).finish()
    rows = rows_of(folder / "run", "online")
    assert len(rows) == 2
    for row in rows:
        assert row["objective/custom_loss"] > 0
        assert row["objective/custom_denominator"] == row["objective/policy_denominator"] > 0
        assert row["rewards/brevity"] < 0 <= row["rewards/format"] <= 1
        total = row["rewards/task"] + 0.5 * row["rewards/brevity"] + 0.1 * row["rewards/format"]
        assert row["rollout/reward"] == pytest.approx(total, abs=1e-9)
        assert row["rollout/accuracy"] == pytest.approx(row["rewards/task"])
        assert row["search/values"] > 0 == row["search/value_errors"]


def test_a_missing_function_ends_the_run_with_one_line(finished_run: FinishedRun, folder: Path) -> None:
    config = own(finished_run) | {"rewards": {"functions": [{"fn": "my_parts.py:nothing"}]}}
    with commands() as start:
        message = train(start, folder, config).fail(2)
    assert "rewards.functions.0.fn 'my_parts.py:nothing': my_parts.py has no 'nothing'" in message
    assert "Traceback" not in message


def test_a_function_that_returns_the_wrong_thing_ends_the_run(finished_run: FinishedRun, folder: Path) -> None:
    config = own(finished_run) | {"rewards": {"functions": [{"fn": "my_parts.py:wrong"}]}}
    with commands() as start:
        message = train(start, folder, config).fail(1)
    assert "reward function wrong: expected a list of one number or None for each completion, found " in message
    assert "Traceback" not in message
