"""The reply of an environment that `rlsys check` shows."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from minimal_config import minimal

from rlsys.commands.check_trials import first_reply
from rlsys.config.environment import active_environment
from rlsys.config.files import parse_config
from rlsys.config.risks import WARNING
from rlsys.errors import ConfigError
from rlsys.models.scratch import build_tokenizer
from rlsys.tasks import build_task
from rlsys.types import Prompt

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CODE = """
from rlsys.environments import Reply

def echo(problem, turns):
    if turns:
        return Reply(text=f"{problem.question} {turns[-1]}")
    return Reply()

def fragile(problem, turns):
    return Reply(text=turns[-1])

def begins(problem, turns):
    return Reply() if turns else Reply(text="state 0")

def tells(problem, turns):
    return Reply() if turns else Reply(text="1" * 400)

asked = []

def counts(problem, turns):
    asked.append(turns)
    return Reply(text=str(len(asked)), reward=1.0) if turns else Reply()
"""


def chatml() -> Any:
    tokenizer = build_tokenizer(["<|im_start|>", "user", "assistant"], 512)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


def shown(task: dict[str, Any], **environment: Any) -> list[str]:
    config = parse_config(minimal(task=task, environment=environment), "c.yaml")
    active = active_environment(config.environment, config.task)
    assert active is not None
    prompt = Prompt(prompt_id="held_out-0", token_ids=np.zeros(1, np.int32), answer="2", question="count a in abc")
    inputs = SimpleNamespace(task=build_task(config.task, 0), held_out=[prompt])
    prepared: Any = SimpleNamespace(inputs=inputs, policy=SimpleNamespace(tokenizer=chatml()))
    return first_reply(config, active, prepared)


def test_the_reply_is_that_to_a_demonstration() -> None:
    [line] = shown({"type": "sums", "tool_share": 0.3, "min_terms": 2, "max_terms": 2})
    assert line.startswith("reply of the environment to the turn '<tool>")
    assert "'<result>" in line


def test_without_such_demonstrations_the_turn_is_its_stop_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    [line] = shown({"type": "letter_count"}, fn="mine.py:echo", stop=["</ask>"])
    assert line == "reply of the environment to the turn '2</ask>' of problem held_out-0: 'count a in abc 2</ask>'"
    with pytest.raises(
        ConfigError,
        match=r"mine.py:fragile' failed before the first turn: IndexError: tuple index out of range \(mine.py:\d+\)",
    ):
        shown({"type": "letter_count"}, fn="mine.py:fragile", stop=["</ask>"])


@pytest.mark.parametrize(
    ("name", "role", "reason"),
    [
        ("begins", "user", "a text before the first turn needs environment.role null; put it into the question"),
        ("tells", None, "the text before the first turn has 400 tokens, too many for actors.max_model_len 256 after "),
    ],
)
def test_a_first_text_that_fails_every_episode_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, role: str | None, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    with pytest.raises(ConfigError) as caught:
        shown({"type": "letter_count"}, fn=f"mine.py:{name}", role=role, stop=[] if role else ["</ask>"])
    assert caught.value.message.startswith(f"environment.fn 'mine.py:{name}': every episode would fail: {reason}")


def test_an_environment_that_answers_the_same_turns_differently_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    _, warning = shown({"type": "letter_count"}, fn="mine.py:counts", stop=["</ask>"])
    assert warning.startswith(f"{WARNING}environment.fn 'mine.py:counts': expected the same reply whenever it is asked")
    assert re.search(r"found '\d', reward 1 and then '\d', reward 1 on the turn '2</ask>'", warning)
