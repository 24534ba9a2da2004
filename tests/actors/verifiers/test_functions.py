"""Functions of the user in real verifier processes."""

from __future__ import annotations

import asyncio

import pytest
from problems import problem_of

from actors.verifiers.pool import RewardPool
from rlsys.config.rewards import RewardsConfig
from rlsys.config.search_values import FunctionValueConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.errors import ConfigError

FUNCTIONS = """
import time

def brevity(completions, level, **columns):
    if "hang" in completions[0]:
        time.sleep(600)
    return [level[0] - len(completions[0])]

def value(completions, **columns):
    return [None if "?" in completions[0] else len(completions[0]) / 10]
"""


def test_functions_of_the_user_run_with_the_deadline_of_a_verification(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    settings = RewardsConfig.model_validate(
        {"timeout_s": 1.0, "memory_mib": 1024, "functions": [{"fn": "mine.py:brevity", "weight": 0.5}]}
    )
    value = FunctionValueConfig(type="function", fn="mine.py:value")

    async def run():
        pool = RewardPool(LetterCountConfig(), 0, settings, folder=str(tmp_path), value=value)
        try:
            problem = problem_of("3", level=30)
            verdicts = await pool.verify([(problem, text) for text in ("<answer>3</answer>", "hang", "hm")])
            return verdicts, await pool.values(problem, ["abc", "a?"])
        finally:
            await pool.close()

    verdicts, values = asyncio.run(run())
    assert [verdict.outcome for verdict in verdicts] == ["ok", "timeout", "wrong"]
    assert [verdict.parts for verdict in verdicts] == [
        {"task": 1.0, "brevity": 12.0},
        {},
        {"task": 0.0, "brevity": 28.0},
    ]
    assert [verdict.reward for verdict in verdicts] == [7.0, 0.0, 14.0]
    assert [(verdict.reward, verdict.answered) for verdict in values] == [(0.3, True), (0.0, False)]


def test_a_function_that_cannot_be_imported_is_the_reason_of_the_failure(tmp_path):
    settings = RewardsConfig.model_validate({"functions": [{"fn": "mine.py:brevity"}]})

    async def run():
        pool = RewardPool(LetterCountConfig(), 0, settings, folder=str(tmp_path))
        try:
            await pool.start()
        finally:
            await pool.close()

    reason = "^rewards.functions.0.fn 'mine.py:brevity': cannot import mine.py: no such file "
    with pytest.raises(ConfigError, match=reason):
        asyncio.run(run())
