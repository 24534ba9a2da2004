"""Multi-IF: conversations with checked instructions, played as episodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from minimal_config import minimal

from rlsys.config.environment import active_environment
from rlsys.config.files import parse_config
from rlsys.config.outside_tasks import BenchmarkConfig
from rlsys.environments import build_environment
from rlsys.errors import DataError
from rlsys.tasks import build_task
from rlsys.types import Verdict

COMMAS = "punctuation:no_comma"
WORDS = "length_constraints:number_words"
AT_LEAST = {"relation": "at least", "num_words": 3}


def columns(turn: int, prompt: str, names: list[str], arguments: list[dict[str, Any]]) -> dict[str, str]:
    """Return the columns of a turn in the form of facebook/Multi-IF: JSON, and JSON in it for each argument."""
    return {
        f"turn_{turn}_prompt": json.dumps({"role": "user", "content": prompt}),
        f"turn_{turn}_instruction_id_list": json.dumps(names),
        f"turn_{turn}_kwargs": json.dumps([json.dumps(each) for each in arguments]),
    }


ROW: dict[str, Any] = {
    "key": "1:1:en",
    "turns": [],
    "responses": [],
    "language": "English",
    **columns(1, "Write about rain, without commas.", [COMMAS], [{}]),
    **columns(2, "At least 3 words, please.", [COMMAS, WORDS], [{}, AT_LEAST]),
    "turn_3_prompt": "",
    "turn_3_instruction_id_list": "",
    "turn_3_kwargs": "",
}


def task_of(folder: Path, *rows: dict[str, Any]) -> Any:
    pytest.importorskip("if_verifiable")
    path = folder / "multi_if.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_task(BenchmarkConfig(name="multi_if", path=str(path)), 0)


def environment_of(folder: Path) -> Any:
    task = {"type": "benchmark", "name": "multi_if", "path": str(folder / "multi_if.jsonl")}
    config = parse_config(minimal(task=task), "c.yaml")
    environment = active_environment(config.environment, config.task)
    assert environment is not None and (environment.role, environment.stop) == ("user", ())
    return build_environment(environment, str(folder))


def test_rows_are_read_and_other_languages_left_out(tmp_path: Path) -> None:
    task = task_of(tmp_path, ROW | {"language": "Chinese"}, ROW)
    assert (task.size("train"), task.size("held_out")) == (0, 1)
    assert task.notes() == ("task.name multi_if: the conversations in English alone",)
    problem = task.problem("held_out", 0)
    assert (problem.problem_id, problem.question) == ("held_out/2", "Write about rain, without commas.")
    assert [turn["instruction_id_list"] for turn in problem.metadata["conversation"]] == [[COMMAS], [COMMAS, WORDS]]
    # The environment judges; the task has no answer to compare.
    assert task.verify(problem, "Rain falls.") == Verdict(outcome="ok", reward=0.0, answered=True)
    # A reward function pays for a conversation that was cut off in its first turn, and it is not right for that.
    assert task.verify(problem, "Rain", finished=False).outcome == "wrong"


@pytest.mark.parametrize(
    ("turns", "rewards", "solved", "details"),
    [
        (["Rain falls.", "Rain falls down."], [0.5, 0.5], True, ["", ""]),
        (["Rain, it falls.", "Rain falls down."], [0.0, 0.5], False, [f"turn 1: not followed: {COMMAS}", ""]),
        (["Rain falls.", "Rain falls"], [0.5, 0.25], False, ["", f"turn 2: not followed: {WORDS}"]),
        (["", "<think>No, no.</think>It falls down."], [0.0, 0.5], False, [f"turn 1: not followed: {COMMAS}", ""]),
    ],
)
def test_an_episode_is_judged_turn_by_turn(
    tmp_path: Path, turns: list[str], rewards: list[float], solved: bool, details: list[str]
) -> None:
    problem = task_of(tmp_path, ROW).problem("held_out", 0)
    play = environment_of(tmp_path)
    assert play(problem, ()).text == ""
    replies = [play(problem, turns[: number + 1]) for number in range(len(turns))]
    assert [reply.text for reply in replies] == ["At least 3 words, please.", ""]
    assert [reply.reward for reply in replies] == rewards
    assert [reply.done for reply in replies] == [False, True]
    # An episode that is cut off in its second turn is not solved by its first.
    assert [reply.solved for reply in replies] == [False, solved]
    assert [reply.detail for reply in replies] == details


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turn_2_kwargs": "[3"}, r"multi_if\.jsonl:1: turn 2: expected JSON in the columns turn_2_prompt"),
        ({"turn_1_prompt": ""} | dict.fromkeys(["turn_2_prompt"], ""), r"expected a first turn in the column"),
        ({"turn_2_kwargs": "[]"}, r"row 1, turn 2: expected instruction_id_list and kwargs with one entry for each"),
        ({"turn_1_instruction_id_list": '["a:b"]'}, r"row 1, turn 1: if-verifiable has no check for .* 'a:b'"),
        ({"language": "French"}, r"expected rows whose column 'language' is English, found none"),
    ],
)
def test_rows_that_cannot_be_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task_of(tmp_path, ROW | changes).size("held_out")
