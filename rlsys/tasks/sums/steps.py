"""Rules for the steps of a chain that adds terms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

from rlsys.tasks import tags
from rlsys.tasks.steps import StepRules, WrongStepError

_ADDITION = re.compile(r"([0-9]{1,12})\+([0-9]{1,12})=([0-9]{1,12})")


class SumSteps(StepRules[int]):
    """Every addition must add the next term to the total so far. The state is the number of added terms."""

    start = 1

    def __init__(self, terms: Sequence[int]) -> None:
        self.terms, self.totals = tuple(terms), list(accumulate(terms, initial=0))

    def think(self, state: int, text: str) -> int:
        match = _ADDITION.fullmatch(text)
        if match is None:
            raise WrongStepError(f"expected an addition, found {text[:40]!r}")
        if state == len(self.terms):
            raise WrongStepError(f"all {state} terms are added already")
        left, right, total = map(int, match.groups())
        if (left, right) != (self.totals[state], self.terms[state]):
            raise WrongStepError(f"expected {self.totals[state]}+{self.terms[state]}, found {left}+{right}")
        if total != left + right:
            raise WrongStepError(f"{left}+{right} is {left + right}, not {total}")
        return state + 1

    def reflect(self, before: int, thought: str, text: str, fault: str) -> None:
        match = _ADDITION.fullmatch(thought)
        if not fault or match is None or text != f"{match[3]} is wrong":
            raise WrongStepError(f"{text[:40]!r} does not name a wrong total of the thought before it")

    def note(self, state: int, tag: str, text: str) -> None:
        total = self.totals[state]
        if tag in (tags.DOUBLE_CHECK, tags.ANSWER) and state < len(self.terms):
            raise WrongStepError(f"{len(self.terms) - state} terms are not added yet")
        expected = {
            tags.SUB_TASK: "+".join(map(str, self.terms)),
            tags.RECLARIFY: f"{len(self.terms)} terms?",
            tags.HYPOTHESIS: "about and a number",
            tags.DOUBLE_CHECK: f"ends in {total % 10}",
            tags.ANSWER: str(total),
        }
        if tag == tags.HYPOTHESIS:
            right = re.fullmatch("about [0-9]{1,12}", text) is not None
        elif tag == tags.ANSWER:
            right = re.fullmatch("[0-9]{1,12}", text.strip()) is not None and int(text) == total
        else:
            right = text == expected[tag]
        if not right:
            raise WrongStepError(f"expected {expected[tag]}, found {text[:40]!r}")
