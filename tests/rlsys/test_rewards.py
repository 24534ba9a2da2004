"""Reward functions: how they are called, what they may return, and what their faults say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from problems import problem_of

from rlsys import rewards
from rlsys.config import rewards as schema
from rlsys.config.rewards import RewardsConfig
from rlsys.errors import ConfigError
from rlsys.rewards import Rewards
from rlsys.types import Message, Problem, Verdict

RIGHT = Verdict(outcome="ok", reward=1.0, answered=True)
WRONG = Verdict(outcome="wrong", reward=0.0, answered=True, detail="another value")
CODE = """
import asyncio
import numpy as np

def brevity(completions, **kwargs):
    return [-len(text) / 10 for text in completions]

def of_columns(completions, level, answer, reference, scale=1):
    return [scale * (level[0] + float(answer[0]) + float(reference[0]))]

def of_messages(prompts, completions, **kwargs):
    [prompt], [completion] = prompts, completions
    assert [m["role"] for m in prompt] == ["system", "user"], prompt
    assert completion == [{"role": "assistant", "content": "hm"}]
    return [float(len(prompt))]

def misspelt(completions, *, referense):
    return [0.0]

async def waits(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5]

def maybe(completions, **kwargs):
    return [None if "?" in text else 2.0 for text in completions]

def array(completions, **kwargs):
    return np.array([0.25], np.float32)

def raises(completions, **kwargs):
    raise KeyError("solution")

def arrays(completions, **kwargs):
    return [np.array([1, 2])]

def no_dimension(completions, **kwargs):
    return np.array(3.0)

def exits(completions, **kwargs):
    raise SystemExit(3)

class Sized:
    def __len__(self):
        raise KeyError("length")

def no_length(completions, **kwargs):
    return Sized()

def returns(completions, value, **kwargs):
    return value

def needs_ids(completions, completion_ids):
    return [0.0]

not_callable = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    return str(tmp_path)


def reward(folder: str, *functions: dict[str, Any], problem: Problem | None = None, text: str = "hm") -> Verdict:
    config = RewardsConfig.model_validate({"functions": functions})
    return Rewards(config, folder).verdict(problem or problem_of("3"), text, WRONG)


def test_without_functions_the_verdict_is_that_of_the_task() -> None:
    assert Rewards(RewardsConfig(), "").verdict(problem_of("3"), "hm", RIGHT) is RIGHT


def test_the_reward_is_the_weighted_sum_and_the_answer_stays_right(folder: str) -> None:
    config = RewardsConfig.model_validate(
        {
            "task_weight": 0.5,
            "functions": [
                {"fn": "mine.py:brevity", "weight": 10.0},
                {"fn": "mine.py:waits", "weight": 2.0, "name": "patience"},
            ],
        }
    )
    verdict = Rewards(config, folder).verdict(problem_of("3"), "abcd", RIGHT)
    assert verdict.reward == pytest.approx(0.5 * 1 + 10 * -0.4 + 2 * 0.5)
    assert verdict.parts == {"task": 1.0, "brevity": pytest.approx(-0.4), "patience": 0.5}
    assert verdict.correct and verdict.answered


def test_without_the_weight_of_the_task_only_functions_count(folder: str) -> None:
    config = RewardsConfig.model_validate({"task_weight": 0, "functions": [{"fn": "mine.py:maybe"}]})
    asked = Rewards(config, folder)
    assert asked.verdict(problem_of("3"), "a", RIGHT).parts == {"maybe": 2.0}
    nothing = asked.verdict(problem_of("3"), "a?", RIGHT)
    assert (nothing.outcome, nothing.reward) == ("error", 0.0)
    assert "every function gave None" in nothing.detail


def test_columns_and_arguments_reach_a_function_by_name(folder: str) -> None:
    function = {"fn": "mine.py:of_columns", "arguments": {"scale": 2}}
    assert reward(folder, function, problem=problem_of("3", level=10)).parts["of_columns"] == 2 * (10 + 3 + 3)
    own = problem_of("3", level=10, answer="100")  # the column of the data set, not the reference read from it
    assert reward(folder, function, problem=own).parts["of_columns"] == 2 * (10 + 100 + 3)


def test_a_conversation_comes_as_messages(folder: str) -> None:
    question = (Message(role="system", content="be brief"), Message(role="user", content="?"))
    problem = Problem(problem_id="p", question=question, answer="3")
    assert reward(folder, {"fn": "mine.py:of_messages"}, problem=problem).parts["of_messages"] == 2.0


def test_a_number_of_numpy_is_a_reward(folder: str) -> None:
    assert reward(folder, {"fn": "mine.py:array"}).parts["array"] == 0.25


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({"fn": "mine.py:raises"}, "reward function raises: KeyError: 'solution' (mine.py:"),
        ({"fn": "mine.py:of_columns"}, "it needs the argument 'level', and the data have no such column; "),
        (
            {"fn": "mine.py:misspelt"},
            "did you mean reference? it can take answer, reference, prompts, ",
        ),
        (
            {"fn": "mine.py:returns", "arguments": {"value": 3.0}},
            "reward function returns: expected a list of one number or None for each completion, found 3.0",
        ),
        ({"fn": "mine.py:returns", "arguments": {"value": [1, 2]}}, "found 2 entries for one completion"),
        ({"fn": "mine.py:returns", "arguments": {"value": "1"}}, "found '1'"),
        ({"fn": "mine.py:returns", "arguments": {"value": ["1"]}}, "found '1'"),
        ({"fn": "mine.py:returns", "arguments": {"value": [float("nan")]}}, "found nan"),
        ({"fn": "mine.py:returns", "arguments": {"value": [10**400]}}, "reward function returns: expected a list of"),
        (
            {"fn": "mine.py:arrays"},
            "reward function arrays: expected a list of one number or None for each completion, found array([1, 2])",
        ),
        ({"fn": "mine.py:no_dimension"}, "reward function no_dimension: expected a list of one number"),
        ({"fn": "mine.py:exits"}, "reward function exits: SystemExit: 3 (mine.py:"),
        ({"fn": "mine.py:no_length"}, "reward function no_length: KeyError: 'length' (mine.py:"),
        (
            {"fn": "mine.py:returns", "arguments": {"value": [1e308]}, "weight": 100},
            "weighted sum of the rewards task 0, returns 1e+308: expected a finite reward, found inf",
        ),
        (
            {"fn": "mine.py:returns", "arguments": {"value": [2e6]}},
            "weighted sum of the rewards task 0, returns 2e+06: expected a reward from -1e+06 to 1e+06, found 2e+06",
        ),
    ],
)
def test_a_fault_of_a_function_is_an_error_that_names_it(folder: str, function: Any, message: str) -> None:
    verdict = reward(folder, function)
    assert (verdict.outcome, verdict.reward, verdict.answered) == ("error", 0.0, False)
    assert message in verdict.detail


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({"fn": "mine.py:missing"}, "mine.py has no 'missing'; it has brevity, of_columns"),
        (
            {"fn": "other.py:brevity"},
            "rewards.functions.0.fn 'other.py:brevity': cannot import other.py: no such file ",
        ),
        ({"fn": "no_such_module:brevity"}, "No module named 'no_such_module', also looked for in"),
        ({"fn": "mine.py:not_callable"}, "expected a function, found int"),
        ({"fn": "mine.py:needs_ids"}, "it needs completion_ids, which does not exist here"),
        ({"fn": "mine.py:of_columns", "arguments": {"scales": 2}}, "has no argument 'scales'"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_it_is_called(
    folder: str, function: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match="rewards.functions.0") as error:
        reward(folder, function)
    assert message in str(error.value)


def test_a_module_is_found_in_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_rewards.py").write_text(CODE)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert reward(str(tmp_path), {"fn": "my_own_rewards:waits"}).parts["waits"] == 0.5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so <answer>3</answer>", 1.0),
        ("<answer>3</answer>\n", 1.0),
        ("<answer></answer>", 0.0),
        ("<answer>3</answer> and more", 0.0),
        ("<answer>2</answer><answer>3</answer>", 0.0),
        ("3", 0.0),
    ],
)
def test_the_form_of_an_answer(text: str, value: float) -> None:
    assert reward("", {"fn": "format"}, text=text).parts["format"] == value
    assert reward("", {"fn": "format", "arguments": {"pattern": ".*3.*"}}, text=text).parts["format"] == float(
        "3" in text
    )


@pytest.mark.parametrize(("length", "value"), [(0, 0.0), (10, 0.0), (15, -0.5), (20, -1.0), (90, -1.0)])
def test_the_length_costs_between_start_and_end(length: int, value: float) -> None:
    function = {"fn": "length", "arguments": {"start": 10, "end": 20}}
    assert reward("", function, text="x" * length).parts["length"] == value


def test_the_schema_knows_the_same_functions() -> None:
    assert tuple(rewards.BUILT_IN) == schema.BUILT_IN


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([{"fn": "a.py:f"}, {"fn": "b.py:f"}], "found 'f' twice; set functions.N.name"),
        ([{"fn": "a.py:task"}], "found 'task' twice"),
        ([{"fn": "length"}], "length needs arguments"),
        ([{"fn": "length", "arguments": {"start": 5, "end": 5}}], "start below end"),
        ([{"fn": "format", "arguments": {"patern": "x"}}], "format has no argument 'patern'"),
        ([{"fn": "brevity"}], "expected `module:name` or `file.py:name`"),
        ([{"fn": "a.py:f", "name": "a b"}], "should match pattern"),
    ],
)
def test_a_wrong_section_is_refused(functions: Any, message: str) -> None:
    with pytest.raises(ValueError, match="rewards|functions|RewardsConfig|length|format|fn|name") as error:
        RewardsConfig.model_validate({"functions": functions})
    assert message in str(error.value)
