"""Judgement of steps: complete nodes, reflections, and chains that are cut off."""

from __future__ import annotations

import pytest

from rlsys.tasks import tags
from rlsys.tasks.steps import StepRules, WrongStepError, judge_steps
from rlsys.types import StepVerdict


class Ascending(StepRules[int]):
    """Thoughts must count from 1. A reflection must say `no`, an answer the last number."""

    start = 0

    def think(self, state: int, text: str) -> int:
        if text != str(state + 1):
            raise WrongStepError(f"expected {state + 1}")
        return state + 1

    def reflect(self, before: int, thought: str, text: str, fault: str) -> None:
        if not fault or text != f"not {thought}":
            raise WrongStepError(f"{before} {thought} {text}")

    def note(self, state: int, tag: str, text: str) -> None:
        if tag == tags.ANSWER and text != str(state):
            raise WrongStepError(f"expected {state}")


def think(*numbers: int) -> str:
    return "".join(f"<thinking>{number}</thinking>" for number in numbers)


@pytest.mark.parametrize(
    ("chain", "wrong_node", "detail"),
    [
        ("", None, ""),
        (think(1, 2) + "<answer>2</answer>", None, ""),
        (think(1, 2) + "<answer>3</answer>", 2, "expected 2"),
        (think(1, 3) + "<answer>3</answer>", 1, "expected 2"),
        (think(1, 3), 1, "expected 2"),
        # A reflection takes a wrong thought back, twice in the second chain, and the next one starts before it.
        (think(1, 3) + "<reflection>not 3</reflection>" + think(2), None, ""),
        (
            think(2) + "<reflection>not 2</reflection>" + think(3) + "<reflection>not 3</reflection>" + think(1),
            None,
            "",
        ),
        (think(1, 3) + "<reflection>not 3</reflection>" + think(4), 3, "expected 2"),
        (think(1) + "<reflection>not 1</reflection>", 1, "0 1 not 1"),
        (think(1, 3) + "<reflection>not 4</reflection>", 2, "1 3 not 4"),
        ("<reflection>not 1</reflection>", 0, "a reflection, but no thought before it"),
        (think(3) + "<reflection>not 3</reflection><reflection>not 3</reflection>", 2, "a reflection, but no thought"),
        # Only the thought directly before a reflection can be taken back.
        (think(3) + "<double-check>3</double-check><reflection>not 3</reflection>", 0, "expected 1"),
    ],
)
def test_the_first_wrong_node(chain: str, wrong_node: int | None, detail: str) -> None:
    verdict = judge_steps(Ascending(), chain)
    assert verdict.wrong_node == wrong_node
    assert verdict.detail.startswith(detail)


@pytest.mark.parametrize(
    "rest", ["", "\n", "<", "<think", "<thinking>", "<thinking>7", "<thinking>7</", "<answer>9</answ"]
)
def test_an_unfinished_node_is_ignored(rest: str) -> None:
    assert judge_steps(Ascending(), think(1, 2) + rest) == StepVerdict()
    assert judge_steps(Ascending(), think(1, 5) + rest).wrong_node == 1


@pytest.mark.parametrize(
    "rest", ["3", "3<thinking>", "</thinking>", "<guess>3", "<thinking>3</answer>", "<thinking>3<answer>3"]
)
def test_text_that_cannot_become_a_node_is_a_wrong_node(rest: str) -> None:
    verdict = judge_steps(Ascending(), think(1) + rest)
    assert verdict == StepVerdict(wrong_node=1, detail="not a node between its two tags")
