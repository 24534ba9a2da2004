"""The reply of an environment that `rlsys check` shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from minimal_config import minimal

from rlsys.commands.check_trials import first_reply
from rlsys.config.environment import active_environment
from rlsys.config.files import parse_config
from rlsys.errors import ConfigError
from rlsys.tasks import build_task
from rlsys.types import Prompt

CODE = """
from rlsys.environments import Reply

def echo(problem, turns):
    if turns:
        return Reply(text=f"{problem.question} {turns[-1]}")
    return Reply()

def fragile(problem, turns):
    return Reply(text=turns[-1])
"""


def shown(task: dict[str, Any], **environment: Any) -> str:
    config = parse_config(minimal(task=task, environment=environment), "c.yaml")
    active = active_environment(config.environment, config.task)
    assert active is not None
    prompt = Prompt(prompt_id="held_out-0", token_ids=np.zeros(1, np.int32), answer="2", question="count a in abc")
    inputs = SimpleNamespace(task=build_task(config.task, 0), held_out=[prompt])
    prepared: Any = SimpleNamespace(inputs=inputs)
    return first_reply(config, active, prepared)


def test_the_reply_is_that_to_a_demonstration() -> None:
    line = shown({"type": "sums", "tool_share": 0.3, "min_terms": 2, "max_terms": 2})
    assert line.startswith("reply of the environment to the turn '<tool>")
    assert "'<result>" in line


def test_without_such_demonstrations_the_turn_is_its_stop_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    line = shown({"type": "letter_count"}, fn="mine.py:echo", stop=["</ask>"])
    assert line == "reply of the environment to the turn '2</ask>' of problem held_out-0: 'count a in abc 2</ask>'"
    with pytest.raises(ConfigError, match=r"mine.py:fragile' failed on no turn: IndexError: tuple index out of range"):
        shown({"type": "letter_count"}, fn="mine.py:fragile", stop=["</ask>"])
