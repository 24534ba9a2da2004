"""The examples of docs/extending.md and docs/coming_from_trl.md run as they are printed."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from pages import write_files

from actors.verifiers.pool import Item, RewardPool
from rlsys.commands import check
from rlsys.config.files import load_config
from rlsys.config.schema import Config, FromScratchConfig
from rlsys.models.scratch import build_from_scratch
from rlsys.tasks import build_task
from rlsys.types import Message, Verdict


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a user would start the command."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verified(config: Config, folder: Path, items: list[Item]) -> list[Verdict]:
    async def run() -> list[Verdict]:
        pool = RewardPool(config.task, config.run.seed, config.rewards, folder=str(folder))
        try:
            return await pool.verify(items)
        finally:
            await pool.close()

    return asyncio.run(run())


def test_a_task_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files("docs/extending.md", folder)
    config = load_config("parity.yaml")
    check.run(config)
    output = capsys.readouterr().out
    assert re.search(r"first held-out prompt, .* odd or even\?", output) and "also held out" not in output
    problem = build_task(config.task, config.run.seed).problem("train", 1)
    right, wrong, none = verified(
        config, folder, [(problem, f"It is {problem.answer}"), (problem, "both even and odd?"), (problem, "")]
    )
    assert (right.correct, right.reward, right.answered) == (True, 1.0, True)
    assert (wrong.correct, wrong.answered, none.answered) == (False, False, False)


def test_a_script_of_trl(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files("docs/coming_from_trl.md", folder)
    build_from_scratch(FromScratchConfig(hidden_size=32, layers=1, heads=1, max_positions=512), [], 0, Path("my-model"))
    config = load_config("trl.yaml")
    check.run(config)
    output = capsys.readouterr().out
    assert "What is 6 + 6?" in output
    assert "task.answer_column null: a completion counts as right if its reward is above 0" in output
    problem = build_task(config.task, 0).problem("train", 0)
    assert problem.question == (Message(role="user", content="What is 3 + 4?"),)
    both, tags = verified(config, folder, [(problem, "<answer>7</answer>"), (problem, "<answer>8</answer>")])
    assert both.reward == pytest.approx(1.2) and both.parts == {"has_tags": 1.0, "right_number": 1.0}
    assert tags.reward == pytest.approx(0.2) and tags.parts == {"has_tags": 1.0, "right_number": 0.0}
