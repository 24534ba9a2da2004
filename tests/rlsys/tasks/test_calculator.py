"""The calculator: values, texts that are no arithmetic, and bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import problem_of

from rlsys.interfaces import Reply
from rlsys.tasks.calculator import calculate, reply


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        (" 2 + 3*4 ", "14"),
        ("(2+3)*-4", "-20"),
        ("7/2", "3.5"),
        ("1/3", "0.333333"),
        ("0.1+0.2", "0.3"),
        ("6/3", "2"),
        ("1/1000000000", "0"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "12*", "1/0", "2**9", "9//2", "True+1", "'a'*3", "__import__('os')", "a+1", "1,2", "max(1,2)", "1e400"),
        *("9" * 31, "+".join(["1"] * 150), "(" * 150 + "1", "-" * 199 + "1" + "+", "1_0 +", "1\x00"),
        "99999999999999999999*99999999999999999999",
    ],
)
def test_other_texts_are_errors(expression: str) -> None:
    assert calculate(expression) == "error"


@given(st.text(max_size=40))
def test_no_text_raises(expression: str) -> None:
    assert isinstance(calculate(expression), str)


def test_the_last_call_of_the_last_turn_is_answered() -> None:
    turns = ["<tool>1+1</tool>", "so <tool>1+2</tool> or <tool>2+2</tool>"]
    assert reply(problem_of("?"), turns) == Reply(text="<result>4</result>")
    assert reply(problem_of("?"), turns[:1]) == Reply(text="<result>2</result>")
    # A call that is not closed is none, and its tag begins no other.
    assert reply(problem_of("?"), ["<tool>1+1<tool>3+3</tool>"]) == Reply(text="<result>6</result>")


@pytest.mark.parametrize("turns", [[], ["<answer>4</answer>"], ["1+1</tool>"]])
def test_without_a_call_there_is_no_answer(turns: list[str]) -> None:
    assert reply(problem_of("?"), turns) == Reply()
