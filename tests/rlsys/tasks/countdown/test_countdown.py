"""The task countdown: problems, demonstrations, verdicts and steps."""

from __future__ import annotations

import random
import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem_of

from rlsys.config.tasks import CountdownConfig, TagShares
from rlsys.tasks import build_task
from rlsys.tasks.countdown.chains import build_chain, weak_plan
from rlsys.tasks.countdown.operations import Operation, Question, compute, possible
from rlsys.tasks.countdown.task import CountdownTask

NO_SHARES = TagShares(sub_task=0, hypothesis=0, double_check=0, reflection=0, reclarify=0)
ALL_SHARES = TagShares(sub_task=1, hypothesis=1, double_check=1, reflection=1, reclarify=1)
QUESTION = "make 26 from 7 3 5 2"


def make_task(seed: int = 0, **fields: object) -> CountdownTask:
    task = build_task(CountdownConfig.model_validate(fields), seed)
    assert isinstance(task, CountdownTask)
    return task


def can_reach(target: int, numbers: tuple[float, ...]) -> bool:
    """Whether any operations on any of the numbers reach a target, with fractions and negative numbers between."""
    if any(abs(number - target) < 1e-9 for number in numbers):
        return True
    for one, two in combinations(range(len(numbers)), 2):
        rest = tuple(number for place, number in enumerate(numbers) if place not in (one, two))
        a, b = numbers[one], numbers[two]
        results = [a + b, a - b, b - a, a * b, *([a / b] if b else []), *([b / a] if a else [])]
        if any(can_reach(target, (*rest, result)) for result in results):
            return True
    return False


def test_a_known_problem_stays_the_same_over_versions() -> None:
    # Runs are reproducible only if the generator does not change.
    assert make_task().problem("train", 0).question == "make 36 from 2 6 3 8"


@given(index=st.integers(0, 10**6))
@settings(max_examples=20)
def test_every_target_can_be_reached_and_fits_the_config(index: int) -> None:
    problem = make_task(min_numbers=3, max_number=12, min_target=15, max_result=60).problem("train", index)
    [(target, numbers)] = re.findall(r"^make (\d+) from ([\d ]+)$", str(problem.question))
    given_numbers = tuple(map(int, numbers.split()))
    assert problem.answer == problem.question
    assert 15 <= int(target) <= 60 and int(target) not in given_numbers
    assert len(given_numbers) in (3, 4) and set(given_numbers) <= set(range(1, 13))
    assert can_reach(int(target), given_numbers)


def test_train_and_held_out_share_no_target_with_the_same_numbers() -> None:
    def parts(seed: int, split: str) -> set[tuple[str, ...]]:
        questions = [str(make_task(seed).problem(split, i).question).split() for i in range(400)]
        return {(words[1], *sorted(words[3:])) for words in questions}

    assert not parts(3, "train") & parts(4, "held_out")


def test_operations_by_hand() -> None:
    assert possible((6, 3, 1), 9) == [
        Operation(3, "+", 1, 4),
        Operation(3, "-", 1, 2),
        Operation(6, "+", 1, 7),
        Operation(6, "-", 1, 5),
        Operation(6, "+", 3, 9),
        Operation(6, "-", 3, 3),
        Operation(6, "/", 3, 2),
    ]
    assert (compute(7, "-", 9), compute(7, "/", 2), compute(7, "/", 0), compute(0, "/", 7)) == (None, None, None, 0)


def test_a_chain_by_hand() -> None:
    # 9 and 3 have the results 12, 6, 27 and 3. Greedily, 27 is nearest to 26; then one number is left.
    chain = build_chain(Question(26, (9, 3)), max_result=99, greedy_rate=1.0, shares=NO_SHARES, rng=random.Random(0))
    assert chain == "<thinking>9*3=27 left 27</thinking><answer>9*3=27</answer>"
    # A plan ends as soon as the target is reached.
    assert weak_plan(Question(27, (9, 3, 5)), 99, 1.0, random.Random(0)) == [Operation(9, "*", 3, 27)]


def test_all_nodes_by_hand() -> None:
    # The first choice, 27, misses the target. The second is 12, the next nearest.
    chain = build_chain(Question(26, (9, 3)), max_result=99, greedy_rate=1.0, shares=ALL_SHARES, rng=random.Random(0))
    assert chain == (
        "<sub-task>make 26</sub-task><reclarify>9 3?</reclarify><hypothesis>1 steps</hypothesis>"
        "<thinking>9*3=27 left 27</thinking><reflection>27 not 26</reflection><thinking>9+3=12 left 12</thinking>"
        "<double-check>12 not 26</double-check><answer>9+3=12</answer>"
    )


def test_the_weak_policy_is_seldom_right() -> None:
    task, rng = make_task(), random.Random(0)
    shown = [task.demonstration(index, rng) for index in range(1000)]
    right = sum(task.verify(problem, chain).reward for problem, chain in shown)
    assert 5 <= right <= 100


@pytest.mark.parametrize(
    ("answer", "reward", "answered", "detail"),
    [
        ("7*3=21,21+5=26", 1.0, True, ""),
        ("5+21=26", 0.0, True, "21 is not left among 7 3 2"),
        (" 3*7=21 , 5+21=26 ", 1.0, True, ""),
        ("7-2=5,5*5=25,3/3=1", 0.0, True, "3 is not left among 25"),
        ("7-2=5,5*5=25", 0.0, True, "the last result is 25, expected 26"),
        ("7*3=26", 0.0, True, "7*3=26 is 21"),
        ("7/2=3", 0.0, True, "7/2=3 is no whole number"),
        ("3-7=4", 0.0, True, "3-7=4 is no whole number"),
        ("7*3+5", 0.0, False, "not a list of operations: '7*3+5'"),
        ("26", 0.0, False, "not a list of operations: '26'"),
        ("", 0.0, False, "not a list of operations: ''"),
    ],
)
def test_verify(answer: str, reward: float, answered: bool, detail: str) -> None:
    verdict = make_task().verify(problem_of(QUESTION), f"<answer>{answer}</answer>")
    assert (verdict.reward, verdict.answered, verdict.detail) == (reward, answered, detail)


FIRST, SECOND = "<thinking>7*3=21 left 21 5 2</thinking>", "<thinking>21+5=26 left 26 2</thinking>"


@pytest.mark.parametrize(
    ("chain", "wrong_node", "detail"),
    [
        (FIRST + SECOND + "<double-check>26 is 26</double-check><answer>7*3=21,21+5=26</answer>", None, ""),
        ("<thinking>3*7=21 left 2 5 21</thinking><thinking>5+21=", None, ""),  # any order
        ("<thinking>7*3=22 left 22 5 2</thinking>", 0, "7*3=22 is 21"),
        (FIRST + "<thinking>7+5=12 left 12 21 2</thinking>", 1, "7 is not left among 21 5 2"),
        ("<thinking>5+5=10 left 10 7 3 2</thinking>", 0, "5 is not left among 7 3 2"),
        ("<thinking>7*3=21 left 21 5</thinking>", 0, "expected left 21 5 2, found '21 5'"),
        ("<thinking>7*3 left 21 5 2</thinking>", 0, "expected one operation"),
        ("<thinking>7*3=21,21+5=26 left 26 2</thinking>", 0, "expected one operation"),
        # A right operation that misses the target may be taken back, and a wrong one too.
        (FIRST + "<reflection>21 not 26</reflection><thinking>7+3=10 left 10 5 2</thinking>", None, ""),
        ("<thinking>7*3=22 left 22 5 2</thinking><reflection>22 not 26</reflection>" + FIRST, None, ""),
        (FIRST + "<reflection>21 not 25</reflection>", 1, "'21 not 25' does not say"),
        (FIRST + SECOND + "<reflection>26 not 26</reflection>", 2, "'26 not 26' does not say"),
        (FIRST + "<double-check>21 is 26</double-check>", 1, "expected 21 not 26, found '21 is 26'"),
        ("<double-check>7 not 26</double-check>", 0, "expected an operation first"),
        (FIRST + "<answer>7*3=21</answer>", 1, "an answer before 26 is reached"),
        (FIRST + SECOND + "<answer>3*7=21,21+5=26</answer>", 2, "expected all operations so far"),
        ("<sub-task>make 26</sub-task><reclarify>7 3 5 2?</reclarify><hypothesis>2 steps</hypothesis>", None, ""),
        ("<sub-task>make 27</sub-task>", 0, "expected make 26"),
        ("<reclarify>7 3 5?</reclarify>", 0, "expected 7 3 5 2?"),
        ("<hypothesis>x steps</hypothesis>", 0, "expected a number of steps"),
    ],
)
def test_steps(chain: str, wrong_node: int | None, detail: str) -> None:
    verdict = make_task().check_steps(QUESTION, chain)
    assert verdict is not None and verdict.wrong_node == wrong_node
    assert verdict.detail.startswith(detail)


@given(index=st.integers(0, 10**6))
@settings(max_examples=60)
def test_demonstrations_are_right_up_to_the_answer(index: int) -> None:
    task = make_task(shares=dict.fromkeys(TagShares.model_fields, 0.5))
    problem, chain = task.demonstration(index, random.Random(index))
    whole, thoughts = (task.check_steps(problem.question, part) for part in (chain, chain.split("<answer>")[0]))
    assert thoughts is not None and thoughts.wrong_node is None
    assert whole is not None and (whole.wrong_node is None) == bool(task.verify(problem, chain).reward)


def test_a_question_of_unknown_form_has_no_rules() -> None:
    assert make_task().check_steps("make it", FIRST) is None
