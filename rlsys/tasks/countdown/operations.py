"""Questions, operations and plans of the task countdown, and the exact check of a plan.

`make 26 from 7 3 5` asks for operations that lead to 26. Each uses two numbers that are left and puts its result in
their place: `7*3=21,21+5=26`. Every digit and sign can be one token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

# Pieces of the texts that are single tokens of a from-scratch tokenizer, in addition to digits.
PIECES = ("make ", " from", " ", "+", "-", "*", "/", "=", ",")

_QUESTION = re.compile(r"make ([0-9]{1,9}) from([0-9 ]+)")
_OPERATION = re.compile(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=([0-9]{1,9})")


class Operation(NamedTuple):
    """Two numbers, the sign between them, and the result."""

    left: int
    sign: str
    right: int
    result: int


class Question(NamedTuple):
    """A target and the given numbers."""

    target: int
    numbers: tuple[int, ...]


def question_text(question: Question) -> str:
    return f"make {question.target} from {' '.join(map(str, question.numbers))}"


def read_question(text: str) -> Question | None:
    """Return the question of a text of `question_text`, None for other texts."""
    match = _QUESTION.fullmatch(text)
    return Question(int(match[1]), tuple(map(int, match[2].split()))) if match else None


def plan_text(plan: Sequence[Operation]) -> str:
    """Return the operations, separated by commas."""
    return ",".join(f"{step.left}{step.sign}{step.right}={step.result}" for step in plan)


def read_plan(text: str) -> tuple[Operation, ...] | None:
    """Return the operations of a text of `plan_text`, whether they are right or not; None for other texts."""
    matches = [_OPERATION.fullmatch(item.strip()) for item in text.split(",")]
    plan = [Operation(int(match[1]), match[2], int(match[3]), int(match[4])) for match in matches if match]
    return tuple(plan) if len(plan) == len(matches) else None


def compute(left: int, sign: str, right: int) -> int | None:
    """Return the result; None if it is negative or not a whole number."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return result if result >= 0 else None


def apply(numbers: Sequence[int], operation: Operation) -> tuple[int, ...] | str:
    """Return the result and then the numbers that are left, or the reason why an operation is wrong."""
    left = list(numbers)
    for number in (operation.left, operation.right):
        if number not in left:
            return f"{number} is not left among {' '.join(map(str, left))}"
        left.remove(number)
    result = compute(operation.left, operation.sign, operation.right)
    if result != operation.result:
        return f"{plan_text([operation])} is {'no whole number' if result is None else f'{result}'}"
    return result, *left


def check_plan(question: Question, plan: Sequence[Operation]) -> str:
    """Return the first reason why a plan does not reach the target, or ""."""
    numbers = question.numbers
    for operation in plan:
        following = apply(numbers, operation)
        if isinstance(following, str):
            return following
        numbers = following
    if plan and numbers[0] == question.target:
        return ""
    return f"the last result is {numbers[0]}, expected {question.target}" if plan else "no operations"


def possible(numbers: Sequence[int], max_result: int) -> list[Operation]:
    """Return the operations on two of the numbers with a result from 1 to max_result, in a fixed order.

    Left out are products with 1 and quotients by 1, which change nothing, and sums and products in the other order.
    """
    operations = []
    for left, right in sorted(set(permutations(numbers, 2))):
        for sign in "+-*/":
            result = compute(left, sign, right)
            is_idle = (sign in "*/" and right == 1) or (sign == "*" and left == 1)
            if result and result <= max_result and not is_idle and not (sign in "+*" and left < right):
                operations.append(Operation(left, sign, right, result))
    return operations
