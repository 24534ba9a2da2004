"""Steps of blocks-world chains."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config.tasks import BlocksworldConfig, TagShares
from rlsys.tasks.blocksworld.task import BlocksworldTask

QUESTION = "now c on a, b\ngoal a on b"
FIRST = "<thinking>unstack c a\nput-down c\nnow a, b, c</thinking>"
SECOND = "<thinking>pick-up a\nstack a b\nnow a on b, c</thinking>"
SLIP = "<thinking>unstack c a\nput-down c\nnow a, c on b</thinking>"
ANSWER = "<answer>unstack c a\nput-down c\npick-up a\nstack a b</answer>"


def make_task(**fields: object) -> BlocksworldTask:
    return BlocksworldTask(BlocksworldConfig.model_validate(fields), 0)


@pytest.mark.parametrize(
    ("chain", "wrong_node", "detail"),
    [
        (FIRST + SECOND + ANSWER, None, ""),
        (FIRST + "<thinking>pick-up c", None, ""),
        (FIRST.replace("now a, b, c", "now c, b, a") + SECOND, None, ""),  # the order of the towers is free
        (SLIP, 0, "expected 'now a, b, c', found 'now a, c on b'"),
        (SLIP + "<reflection>not c on b</reflection>" + FIRST + SECOND + ANSWER, None, ""),
        (SLIP + "<reflection>not c on a</reflection>" + FIRST, 1, "'not c on a' does not name a wrong place"),
        (SLIP + "<reflection>not a on table</reflection>" + FIRST, 1, "'not a on table' does not name"),
        (FIRST + "<reflection>not c on table</reflection>", 1, "'not c on table' does not name"),
        (SLIP + "<reflection>c on b</reflection>", 1, "'c on b' does not name"),
        ("<thinking>unstack c b\nnow a, b, hold c</thinking>", 0, "move 1 (unstack c b): c is not on b"),
        ("<thinking>pick-up a\nnow c, b, hold a</thinking><reflection>not hold a</reflection>", None, ""),
        ("<thinking>now c on a, b</thinking>", 0, "no moves"),
        ("<thinking>fly c\nnow a, b, c</thinking>", 0, "move 1 (fly c): expected pick-up"),
        ("<thinking>unstack c a\na, b, hold c</thinking>", 0, "expected 'now a, b, hold c'"),
        ("<thinking>unstack c a\nnow a, a, b, hold c</thinking>", 0, "expected 'now a, b, hold c'"),
        ("<sub-task>get a on b</sub-task><reclarify>goal a on b</reclarify><hypothesis>4 moves</hypothesis>", None, ""),
        ("<sub-task>get a on c</sub-task>", 0, "expected get a on b, found 'get a on c'"),
        ("<reclarify>goal b on a</reclarify>", 0, "expected goal a on b"),
        ("<hypothesis>many</hypothesis>", 0, "expected a number of moves"),
        (FIRST + "<double-check>now b, a, c</double-check>", None, ""),
        (FIRST + "<double-check>now a on b, c</double-check>", 1, "expected 'now a, b, c'"),
        (FIRST + ANSWER, 1, "an answer before the goal is reached: a on b is missing"),
        (FIRST + SECOND + "<answer>unstack c a\nstack c b</answer>", 2, "expected all moves so far"),
    ],
)
def test_steps(chain: str, wrong_node: int | None, detail: str) -> None:
    verdict = make_task().check_steps(QUESTION, chain)
    assert verdict is not None and verdict.wrong_node == wrong_node
    assert verdict.detail.startswith(detail)


@given(index=st.integers(0, 10**6), moves_per_node=st.integers(1, 3))
@settings(max_examples=30)
def test_steps_of_demonstrations_without_errors_are_right(index: int, moves_per_node: int) -> None:
    shares = dict.fromkeys(TagShares.model_fields, 0.5)
    task = make_task(max_blocks=4, error_rate=0, moves_per_node=moves_per_node, shares=shares)
    problem, chain = task.demonstration(index, random.Random(index))
    verdict = task.check_steps(problem.question, chain)
    assert verdict is not None and verdict.wrong_node is None


def test_more_blocks_than_in_the_demonstrations() -> None:
    task = make_task(min_blocks=4, max_blocks=5, demonstrations={"min_blocks": 3, "max_blocks": 3})

    def blocks(question: object) -> int:
        return len(str(question).split("\n")[0].replace(" on ", ", ").split(", "))

    assert {blocks(task.demonstration(i, random.Random(i))[0].question) for i in range(50)} == {3}
    assert {blocks(task.problem("train", i).question) for i in range(50)} == {4, 5}
