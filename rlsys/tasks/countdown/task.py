"""Countdown: operations that lead from given numbers to a target. Generator and exact verifier."""

from __future__ import annotations

import hashlib
import random

from rlsys.config.tasks import CountdownConfig
from rlsys.tasks import tags
from rlsys.tasks.countdown import chains
from rlsys.tasks.countdown.operations import PIECES, Question, check_plan, question_text, read_plan, read_question
from rlsys.tasks.countdown.steps import CountdownSteps
from rlsys.tasks.generated import CORRECT, GeneratedTask, wrong
from rlsys.tasks.reasons import quoted
from rlsys.types import Problem, Verdict

HELD_OUT_EVERY = 10
"""The hash of target and numbers assigns one problem in HELD_OUT_EVERY to the held-out split, for every seed."""


class CountdownTask(GeneratedTask[CountdownConfig, Question]):
    """Operations (+, -, * and exact /) on given numbers, each used at most once, that reach a target.

    The sha256 of the target and the sorted numbers decides the split of a problem. The answer of a problem is its
    question: the verifier executes the operations and accepts all that reach the target.
    """

    one_answer = False

    def vocabulary(self) -> tuple[str, ...]:
        """Return the tags, pieces of questions and chains, and digits."""
        return (*tags.tag_strings(), *PIECES, *chains.PIECES, *"0123456789")

    def _read_problems(self) -> tuple[Problem, ...]:
        return ()

    def _draw(self, rng: random.Random) -> Question | None:
        """Return random numbers, and the result of random operations on all of them as the target."""
        count = rng.randint(self.config.min_numbers, self.config.max_numbers)
        numbers = tuple(rng.randint(1, self.config.max_number) for _ in range(count))
        plan = chains.weak_plan(Question(0, numbers), self.config.max_result, 0.0, rng)
        target = plan[-1].result
        fits = len(plan) == count - 1 and target >= self.config.min_target and target not in numbers
        return Question(target, numbers) if fits else None

    def _problem(self, problem_id: str, instance: Question) -> Problem:
        text = question_text(instance)
        return Problem(problem_id=problem_id, question=text, answer=text)

    def _chain(self, instance: Question, rng: random.Random) -> str:
        return chains.build_chain(
            instance,
            max_result=self.config.max_result,
            greedy_rate=self.config.greedy_rate,
            shares=self.config.shares,
            rng=rng,
        )

    def _judge(self, problem_answer: str, text: str) -> Verdict:
        question, plan = read_question(problem_answer), read_plan(text)
        if plan is None or question is None:
            return wrong(f"not a list of operations: {quoted(text)}", answered=False)
        fault = check_plan(question, plan)
        return wrong(fault) if fault else CORRECT

    def _step_rules(self, question: str) -> CountdownSteps | None:
        read = read_question(question)
        return None if read is None else CountdownSteps(read)

    def identity(self, question: str) -> str:
        read = read_question(question)
        return "" if read is None else question_text(Question(read.target, tuple(sorted(read.numbers))))

    def _is_held_out(self, identity: str) -> bool:
        return hashlib.sha256(identity.encode()).digest()[0] % HELD_OUT_EVERY == 0

    def _advice(self) -> str:
        return (
            f"{self.config.min_numbers} to {self.config.max_numbers} numbers up to {self.config.max_number}, targets "
            f"from {self.config.min_target} to {self.config.max_result}; raise task.max_number or task.max_result"
        )
