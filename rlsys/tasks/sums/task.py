"""Sums of several numbers: generator and verifier."""

from __future__ import annotations

import hashlib
import random
import re

from rlsys.config.tasks import SumsConfig
from rlsys.tasks import calculator, tags
from rlsys.tasks.generated import CORRECT, GeneratedTask, wrong
from rlsys.tasks.reasons import quoted, read_and_expected
from rlsys.tasks.sums import chains
from rlsys.tasks.sums.steps import SumSteps
from rlsys.types import Chain, Problem, Verdict

HELD_OUT_EVERY = 10
"""The hash of the terms assigns one sum in HELD_OUT_EVERY to the held-out split, for every seed."""

_QUESTION = re.compile(r"add( [0-9]{1,9})+")


class SumsTask(GeneratedTask[SumsConfig, tuple[int, ...]]):
    """The sum of several numbers: `add 37 58 19`.

    The sha256 of the sorted terms decides the split of a problem.
    """

    one_answer = True
    noun = "sum"

    def vocabulary(self) -> tuple[str, ...]:
        """Return the tags, pieces of questions and chains, and digits."""
        tool = (*calculator.TAGS, calculator.UNREADABLE) if self.config.tool_share else ()
        return (*tags.tag_strings(), "add", " ", *chains.PIECES, *"0123456789", *tool)

    def _read_problems(self) -> tuple[Problem, ...]:
        return ()

    def _draw(self, rng: random.Random) -> tuple[int, ...]:
        count = rng.randint(self.config.min_terms, self.config.max_terms)
        digits = [rng.randint(self.config.min_digits, self.config.max_digits) for _ in range(count)]
        return tuple(rng.randrange(10 ** (number - 1), 10**number) for number in digits)

    def _problem(self, problem_id: str, instance: tuple[int, ...]) -> Problem:
        return Problem(problem_id=problem_id, question=f"add {' '.join(map(str, instance))}", answer=str(sum(instance)))

    def _chain(self, instance: tuple[int, ...], rng: random.Random) -> Chain:
        share, error_rate = self.config.tool_share, self.config.error_rate
        if share:
            return chains.build_tool_chain(instance, tool_share=share, error_rate=error_rate, rng=rng)
        return chains.build_chain(instance, error_rate=error_rate, shares=self.config.shares, rng=rng)

    def _judge(self, problem_answer: str, text: str) -> Verdict:
        if not re.fullmatch(r"[0-9]{1,12}", text):
            return wrong(f"not a number: {quoted(text)}", answered=False)
        right = int(text) == int(problem_answer)
        return CORRECT if right else wrong(read_and_expected(text, problem_answer))

    def _step_rules(self, question: str) -> SumSteps | None:
        """Return the rules for additions in thinking nodes; calls of a calculator have none."""
        has_rules = _QUESTION.fullmatch(question) and not self.config.tool_share
        return SumSteps(_terms(question)) if has_rules else None

    def identity(self, question: str) -> str:
        return " ".join(map(str, sorted(_terms(question))))

    def _is_held_out(self, identity: str) -> bool:
        return hashlib.sha256(identity.encode()).digest()[0] % HELD_OUT_EVERY == 0

    def _advice(self) -> str:
        return (
            f"{self.config.min_terms} to {self.config.max_terms} terms of {self.config.min_digits} to "
            f"{self.config.max_digits} digits; raise task.max_terms or task.max_digits"
        )


def _terms(question: str) -> list[int]:
    return [int(word) for word in question.split()[1:]]
