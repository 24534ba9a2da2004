"""Environments in real verifier processes: replies, failures, and episodes that go on after a killed process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from problems import problem_of

from actors.verifiers.pool import RewardPool
from rlsys.config.environment import EnvironmentConfig, active_environment
from rlsys.config.rewards import RewardsConfig
from rlsys.config.tasks import LetterCountConfig, SumsConfig, TaskConfig
from rlsys.errors import ConfigError
from rlsys.interfaces import Reply
from rlsys.types import Verdict

HERE = str(Path(__file__).parent)
LIMITS = RewardsConfig(workers=1, timeout_s=0.7, memory_mib=1024)
OBEY = EnvironmentConfig(fn="scripted_environment.py:obey", arguments={"greeting": "hello"}, stop=(";",))


def ask(
    turns: Sequence[Sequence[str]], environment: EnvironmentConfig, task: TaskConfig | None = None
) -> list[Reply | Verdict]:
    async def run() -> list[Reply | Verdict]:
        section = active_environment(environment, task or LetterCountConfig())
        pool = RewardPool(task or LetterCountConfig(), 0, LIMITS, folder=HERE, environment=section)
        try:
            return await pool.replies([(problem_of("7"), each) for each in turns])
        finally:
            await pool.close()

    return asyncio.run(run())


def failure(answer: Reply | Verdict) -> tuple[str, str]:
    assert isinstance(answer, Verdict)
    assert (answer.reward, answer.answered) == (0.0, False)
    return answer.outcome, answer.detail


def test_failures_lose_one_reply_and_nothing_else() -> None:
    commands = ["go", "hang", "raise", "exit", "string", "number", "nan", "long", "longest", "surrogate", "end"]
    answers = ask([(), *[("a", command) for command in commands]], OBEY)
    assert answers[0] == Reply(text="hello")
    by_command: dict[str, Any] = dict(zip(commands, answers[1:], strict=True))
    assert by_command["go"] == Reply(text="7:2", reward=0.5, solved=False)
    assert by_command["end"] == Reply(text="7:2", reward=0.5, done=True, solved=True)
    assert by_command["longest"].text == "\U0001f600" * 90_000, "a line of more than one read"
    assert by_command["surrogate"].text == "a?b"
    details = {name: failure(by_command[name]) for name in commands if isinstance(by_command[name], Verdict)}
    assert details == {
        "hang": ("timeout", "no verdict after rewards.timeout_s = 0.7 s"),
        "raise": ("error", "ValueError: no such room (scripted_environment.py:25)"),
        "exit": ("error", "the verifier process ended: exit status 3"),
        "string": ("error", "expected a Reply, found str"),
        "number": ("error", "expected a Reply with a string as text, found int"),
        "nan": ("error", "expected a finite reward, found nan"),
        "long": ("error", "expected a Reply of at most 100000 characters, found 200000"),
    }


def test_a_killed_process_loses_no_episode() -> None:
    """The state of a game is its turns, so the next process has it too."""
    counter = EnvironmentConfig(fn="scripted_environment.py:Counter", arguments={"step": 2}, stop=(";",))
    answers = ask([(), ("1",), ("1", "x"), ("1", "2"), ("1", "2", "3"), ("2", "1", "0.5")], counter)
    assert answers[0] == Reply(text="reach 7")
    assert [each.text for each in answers if isinstance(each, Reply)] == ["reach 7", "2", "6", "12"]
    assert failure(answers[2])[0] == failure(answers[5])[0] == "error"


def test_a_process_that_a_reply_starts_ends_with_it() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    assert isinstance(ask([("fork",)], OBEY)[0], Reply)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]


def test_verdicts_and_replies_come_from_the_same_process() -> None:
    async def run() -> tuple[Any, ...]:
        task = SumsConfig(tool_share=0.5)
        section = active_environment(EnvironmentConfig(), task)
        pool = RewardPool(task, 0, LIMITS, environment=section)
        try:
            reply = pool.replies([(problem_of("19"), ("<tool>12+7</tool>",))])
            verdict = pool.verify([(problem_of("19"), "<tool>12+7</tool><answer>19</answer>", True)])
            found = await asyncio.gather(reply, verdict)
            assert pool.verdicts == 2
            return tuple(found)
        finally:
            await pool.close()

    [reply], [verdict] = asyncio.run(run())
    assert reply == Reply(text="<result>19</result>")
    assert verdict.correct


@pytest.mark.parametrize(
    ("fn", "arguments", "message"),
    [
        ("scripted_environment.py:nothing", {}, "scripted_environment.py has no 'nothing'"),
        ("scripted_environment.py:obey", {"speed": 3}, "unexpected keyword argument 'speed'"),
    ],
)
def test_an_environment_that_cannot_be_built_shows_at_the_start(
    fn: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ask([()], EnvironmentConfig(fn=fn, arguments=arguments, stop=(";",)))
    assert message in caught.value.message
