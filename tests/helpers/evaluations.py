"""Samples and results of evaluations, written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fakes import NumberTask, prompt

from rlsys.evaluation.figures import result_figures
from rlsys.evaluation.records import Sample
from rlsys.types import Prompt, StepVerdict

ANSWERS: Mapping[str, Sequence[int]] = {"p0": (3, 7, 7, 3), "p1": (7, 3, 0, 3), "p2": (0, 0, 0, 0)}
"""The answers of four samples by problem; 0 stands for none. 7 is right."""


def sample(text: str = "", **changes: Any) -> Sample:
    values: dict[str, Any] = {"tokens": 2, "right": False, "judged": True, "answered": True, "truncated": False}
    values["out_of_turns"] = False
    reward = float(changes.get("right", False))
    return Sample(text=text, **{**values, "reward": reward, "reason": "", "logprob": -1.0, **changes})


def rows_of(answers: Mapping[str, Sequence[int]]) -> list[list[Sample]]:
    return [
        [sample(f"<answer>{answer}</answer>", right=answer == 7, answered=answer > 0) for answer in drawn]
        for drawn in answers.values()
    ]


def prompts(count: int) -> list[Prompt]:
    return [replace(prompt(f"p{number}"), question=f"p{number}?") for number in range(count)]


class Steps(NumberTask):
    """A task whose steps a function checks."""

    def __init__(self, check: Callable[[str, str], StepVerdict | None]) -> None:
        super().__init__(4)
        self.check = check

    def check_steps(self, question: Any, completion: str) -> Any:
        return self.check(question, completion)


def result(
    name: str = "a",
    task: str = "numbers",
    tokenizer: str = "t",
    answers: Mapping[str, Sequence[int]] = ANSWERS,
    **modes: Any,
) -> dict[str, Any]:
    """Return the result of a model with four samples of each problem, of which the first is the greedy one."""
    rows = rows_of(answers)
    figures = result_figures(
        NumberTask(4), prompts(len(rows)), {"greedy": [row[:1] for row in rows], "sampled": rows, **modes}
    )
    return {"model": {"name": name, "weights": name, "tokenizer": tokenizer}, "task": task, **figures}
