"""Rules for the steps of a chain that counts letters."""

from __future__ import annotations

import re
from itertools import accumulate

from rlsys.tasks import tags
from rlsys.tasks.steps import StepRules, WrongStepError

_PAIR = re.compile(r"([a-z])([0-9]{1,3})")
_SIMPLE = re.compile(r"count ([a-z]) in ([a-z]+)")
_TWO_LETTERS = re.compile(r" ([a-z]) and ([a-z])\b")


class CountSteps(StepRules[int]):
    """Every letter pair and its running count against the word. The state is the number of counted letters."""

    start = 0

    def __init__(self, word: str, targets: str) -> None:
        self.word, self.targets = word, targets
        self.counts = list(accumulate((letter in targets for letter in word), initial=0))

    def think(self, state: int, text: str) -> int:
        if not re.fullmatch(f"(?:{_PAIR.pattern})+", text):
            raise WrongStepError(f"expected letters, each with a count, found {text[:40]!r}")
        for letter, count in _PAIR.findall(text):
            if self.word[state : state + 1] != letter:
                raise WrongStepError(f"letter {state + 1} is {self.word[state : state + 1] or 'missing'}, not {letter}")
            state += 1
            if int(count) != self.counts[state]:
                raise WrongStepError(f"the count after letter {state} ({letter}) is {self.counts[state]}, not {count}")
        return state

    def reflect(self, before: int, thought: str, text: str, fault: str) -> None:
        last = _PAIR.findall(thought)[-1:]
        if not fault or not last or text != f"{last[0][1]} is wrong":
            raise WrongStepError(f"{text[:40]!r} does not name a wrong count of the thought before it")

    def note(self, state: int, tag: str, text: str) -> None:
        total = self.counts[state]
        if tag in (tags.DOUBLE_CHECK, tags.ANSWER) and state < len(self.word):
            raise WrongStepError(f"{len(self.word) - state} letters are not counted yet")
        named = " and ".join(self.targets)
        expected = {
            tags.SUB_TASK: f"count {named}",
            tags.RECLARIFY: f"{named}?",
            tags.DOUBLE_CHECK: f"{self.targets}{total}",
        }
        if tag == tags.HYPOTHESIS:
            right = re.fullmatch("[0-9]{1,3}", text) is not None
        elif tag == tags.ANSWER:
            right = re.fullmatch("[0-9]{1,9}", text.strip()) is not None and int(text) == total
        else:
            right = text == expected[tag]
        if not right:
            raise WrongStepError(f"expected {expected.get(tag, total)!r}, found {text[:40]!r}")


def count_steps(question: str) -> CountSteps | None:
    """Return the rules for a question of either form, or None for a question in other words."""
    if simple := _SIMPLE.fullmatch(question):
        return CountSteps(simple[2], simple[1])
    letters = _TWO_LETTERS.search(question)
    return CountSteps(re.findall(r"[a-z]+", question.lower())[-1], letters[1] + letters[2]) if letters else None
