"""Rules for the steps of a chain of the task countdown."""

from __future__ import annotations

import re

from rlsys.tasks import tags
from rlsys.tasks.countdown.chains import outcome
from rlsys.tasks.countdown.operations import Operation, Question, apply, read_plan
from rlsys.tasks.steps import StepRules, WrongStepError


class CountdownSteps(StepRules[tuple[tuple[int, ...], tuple[Operation, ...]]]):
    """Every operation must use numbers that are left, and its result and the numbers after it must be right.

    The state has the numbers that are left and all operations so far. A right operation may be taken back, if its
    result is not the target.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self.start = question.numbers, ()

    def think(
        self, state: tuple[tuple[int, ...], tuple[Operation, ...]], text: str
    ) -> tuple[tuple[int, ...], tuple[Operation, ...]]:
        numbers, made = state
        written, _, left = text.partition(" left ")
        plan = read_plan(written)
        if plan is None or len(plan) != 1:
            raise WrongStepError(f"expected one operation and the numbers that are left, found {text[:40]!r}")
        following = apply(numbers, plan[0])
        if isinstance(following, str):
            raise WrongStepError(following)
        if sorted(left.split()) != sorted(map(str, following)):
            raise WrongStepError(f"expected left {' '.join(map(str, following))}, found {left[:40]!r}")
        return following, (*made, *plan)

    def reflect(
        self, before: tuple[tuple[int, ...], tuple[Operation, ...]], thought: str, text: str, fault: str
    ) -> None:
        plan = read_plan(thought.partition(" left ")[0])
        target = self.question.target
        if not plan or plan[-1].result == target or text != outcome(plan[-1].result, target):
            raise WrongStepError(f"{text[:40]!r} does not say that the last result misses {target}")

    def note(self, state: tuple[tuple[int, ...], tuple[Operation, ...]], tag: str, text: str) -> None:
        numbers, made = state
        target = self.question.target
        expected = {
            tags.SUB_TASK: f"make {target}",
            tags.RECLARIFY: f"{' '.join(map(str, self.question.numbers))}?",
            tags.DOUBLE_CHECK: outcome(numbers[0], target) if made else "an operation first",
            tags.HYPOTHESIS: "a number of steps",
            tags.ANSWER: "all operations so far",
        }
        if tag == tags.ANSWER and not (made and numbers[0] == target):
            raise WrongStepError(f"an answer before {target} is reached")
        if tag == tags.ANSWER:
            right = read_plan(text) == made
        elif tag == tags.HYPOTHESIS:
            right = re.fullmatch("[0-9]{1,3} steps", text) is not None
        else:
            right = text == expected[tag]
        if not right:
            raise WrongStepError(f"expected {expected[tag]}, found {text[:40]!r}")
