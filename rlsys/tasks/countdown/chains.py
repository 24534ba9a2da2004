"""Worked chains of a weak policy for the task countdown. A node makes one operation and notes what is left."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlsys.config.tasks import TagShares
from rlsys.tasks import tags
from rlsys.tasks.countdown.operations import Operation, Question, apply, plan_text, possible
from rlsys.tasks.generated import join_nodes

# Pieces of chains that are single tokens of a from-scratch tokenizer.
PIECES = (" left", " is ", " not ", " steps", "?")


def weak_plan(question: Question, max_result: int, greedy_rate: float, rng: random.Random) -> list[Operation]:
    """Return operations until the target is the result, or one number is left.

    With probability `greedy_rate`, an operation is the one whose result is nearest to the target; otherwise it is
    chosen at random.
    """
    numbers = question.numbers
    plan: list[Operation] = []
    while len(numbers) > 1 and not (plan and numbers[0] == question.target):
        operation = _choose(possible(numbers, max_result), question.target, greedy_rate, rng)
        if operation is None:
            break
        plan.append(operation)
        numbers = left_after(numbers, operation)
    return plan


def build_chain(
    question: Question, *, max_result: int, greedy_rate: float, shares: TagShares, rng: random.Random
) -> str:
    """Return a chain that makes a weak plan, which often misses the target.

    `shares` has the probabilities of the optional nodes. If the plan misses the target, then with probability
    shares.reflection a reflection takes back its last operation, and another one follows, chosen in the same way.
    """
    present = tags.draw(shares, rng)
    plan = weak_plan(question, max_result, greedy_rate, rng)
    numbers = question.numbers
    nodes = []
    for operation in plan[:-1]:
        nodes.append(_thinking(numbers, operation))
        numbers = left_after(numbers, operation)
    nodes.append(_thinking(numbers, plan[-1]))
    if present[tags.REFLECTION] and plan[-1].result != question.target:
        nodes.append(tags.node(tags.REFLECTION, outcome(plan[-1].result, question.target)))
        others = [operation for operation in possible(numbers, max_result) if operation != plan[-1]]
        plan[-1] = _choose(others, question.target, greedy_rate, rng) or plan[-1]
        nodes.append(_thinking(numbers, plan[-1]))
    return join_nodes(
        present,
        sub_task=lambda: f"make {question.target}",
        reclarify=lambda: f"{' '.join(map(str, question.numbers))}?",
        hypothesis=lambda: f"{rng.randint(1, len(question.numbers) - 1)} steps",
        thinking=lambda: nodes,
        double_check=lambda: outcome(plan[-1].result, question.target),
        answer=plan_text(plan),
    )


def outcome(result: int, target: int) -> str:
    """Return whether a result is the target: `26 is 26`, `21 not 26`."""
    return f"{result} {'is' if result == target else 'not'} {target}"


def left_after(numbers: Sequence[int], operation: Operation) -> tuple[int, ...]:
    """Return the numbers after a right operation.

    Raises:
        ValueError: The operation is wrong.
    """
    following = apply(numbers, operation)
    if isinstance(following, str):
        raise ValueError(following)
    return following


def _choose(operations: Sequence[Operation], target: int, greedy_rate: float, rng: random.Random) -> Operation | None:
    if not operations:
        return None
    if rng.random() < greedy_rate:
        return min(operations, key=lambda operation: abs(operation.result - target))
    return rng.choice(operations)


def _thinking(numbers: Sequence[int], operation: Operation) -> str:
    left = " ".join(map(str, left_after(numbers, operation)))
    return tags.node(tags.THINKING, f"{plan_text([operation])} left {left}")
