"""Figures of an evaluation, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evaluations import ANSWERS, Steps, prompts, rows_of, sample
from fakes import NumberTask, prompt

from rlsys.evaluation.figures import mode_figures, result_figures, sample_counts
from rlsys.stats import pass_at_k
from rlsys.types import StepVerdict


def test_the_counts_of_pass_at_k() -> None:
    assert [sample_counts(samples) for samples in (1, 2, 4, 6, 64)] == [
        [1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32, 64],
    ]  # fmt: skip


def test_the_figures_of_samples_by_hand() -> None:
    rows = [
        [sample("<answer>7</answer>", right=True, tokens=10), sample("<answer>3</answer>", tokens=20)],
        [sample("no idea", answered=False, reason="no final <answer>", tokens=30), sample(judged=False, tokens=40)],
        [
            sample("7 " * 30, answered=False, truncated=True, tokens=60),
            sample("<answer>7</answer>", right=True, tokens=14),
        ],
    ]
    figures = mode_figures(NumberTask(4), prompts(3), rows)
    assert figures["accuracy"]["mean"] == pytest.approx(2 / 6)
    assert figures["no_answer_rate"]["mean"] == pytest.approx(2 / 6)  # of the one without a verdict nothing is known
    assert figures["truncated_rate"]["mean"] == pytest.approx(1 / 6)
    assert figures["out_of_turns_rate"]["mean"] == 0.0
    assert figures["reward"]["mean"] == pytest.approx(2 / 6)
    assert figures["error_rate"] == pytest.approx(1 / 6)
    assert figures["completion_length"] == figures["completion_lengths"]["mean"]["mean"] == pytest.approx(29)
    assert figures["completion_lengths"]["median"] == 25  # of 10, 14, 20, 30, 40, 60
    assert figures["completion_lengths"]["quantile_95"] == pytest.approx(55)  # a quarter of the way from 60 to 40
    assert figures["by_problem"]["accuracy"] == [0.5, 0, 0.5]
    assert figures["by_problem"]["completion_length"] == [15, 35, 37]
    thinking = figures["thinking"]
    assert {name: each["share"]["mean"] for name, each in thinking.items()} == {
        "repetition": pytest.approx(1 / 6), "over_reflection": 0, "ignored_instruction": pytest.approx(1 / 6),
    }  # fmt: skip
    assert thinking["ignored_instruction"]["reasons"] == {"no final <answer>": 1}
    ignored = {"problem": "p1", "sample": 0, "evidence": "no final <answer>", "text": "no idea"}
    assert thinking["ignored_instruction"]["completions"] == [ignored]
    [loop] = thinking["repetition"]["completions"]
    assert (loop["problem"], loop["sample"], loop["evidence"]) == ("p2", 0, ("7 " * 30).strip())
    assert json.loads(json.dumps(figures)) == figures


def test_intervals_are_over_problems_and_not_over_samples() -> None:
    """A hundred equal samples of a problem tell no more than one."""

    def width(samples: int) -> float:
        rows = [[sample("x", right=number % 2 == 0)] * samples for number in range(20)]
        accuracy = mode_figures(NumberTask(20), prompts(20), rows)["accuracy"]
        return float(accuracy["high"] - accuracy["low"])

    assert width(100) == width(1)


def test_reasons_are_counted_without_the_text_that_they_quote() -> None:
    rows = [[sample("x", answered=False, reason=f"not a number: {text!r}")] for text in ("a", "b's")]
    thinking = mode_figures(NumberTask(2), prompts(2), rows)["thinking"]
    assert thinking["ignored_instruction"]["reasons"] == {"not a number: ...": 2}
    assert [each["evidence"] for each in thinking["ignored_instruction"]["completions"]] == [
        "not a number: 'a'", 'not a number: "b\'s"',
    ]  # fmt: skip


def test_pass_at_k_and_the_most_frequent_answer_of_the_first_samples() -> None:
    figures = result_figures(NumberTask(4), prompts(3), {"sampled": rows_of(ANSWERS)})
    # 2, 1 and 0 of 4 are right: 1 - C(2,2)/C(4,2) = 5/6, 1 - C(3,2)/C(4,2) = 1/2 and 0.
    assert figures["pass_at_k"]["2"]["mean"] == pytest.approx((5 / 6 + 1 / 2) / 3)
    # Of 2 samples the first answer decides: p1. Of 4, p0 has two of each, of which 3 came first; p1 has 3 twice.
    assert {k: row["mean"] for k, row in figures["majority_at_k"].items()} == {"2": pytest.approx(1 / 3), "4": 0.0}
    assert figures["sampled"]["by_problem"]["majority@4"] == [0, 0, 0]
    assert figures["samples"] == 4
    one = result_figures(NumberTask(4), prompts(3), {"sampled": [row[:1] for row in rows_of(ANSWERS)]})
    assert "majority_at_k" not in one and list(one["pass_at_k"]) == ["1"]
    greedy = result_figures(NumberTask(4), prompts(3), {"greedy": [row[:1] for row in rows_of(ANSWERS)]})
    assert "pass_at_k" not in greedy and greedy["samples"] == 0


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples() -> None:
    from itertools import combinations

    right = np.array([[1, 0, 0, 1, 0, 0]])
    chosen = [any(right[0, list(choice)]) for choice in combinations(range(6), 3)]
    assert pass_at_k(right, 3)[0, 0] == pytest.approx(np.mean(chosen))


def test_the_steps_of_right_chains_are_judged() -> None:
    """Three of the samples are right; the chains of p0 have a wrong step, and the third one cannot be checked."""
    judged: list[tuple[str, str]] = []

    def check(question: str, chain: str) -> StepVerdict | None:
        judged.append((question, chain))
        return StepVerdict(wrong_node=0 if question == "p0?" else None) if len(judged) < 3 else None

    figures = mode_figures(Steps(check), prompts(3), rows_of(ANSWERS))
    assert judged == [(question, "<answer>7</answer>") for question in ("p0?", "p0?", "p1?")]
    assert figures["every_step_right"] == {"right": 0, "checked": 2}


@pytest.mark.parametrize("one_answer", [True, False])
def test_figures_by_true_answer_of_tasks_with_one_answer(one_answer: bool) -> None:
    # One greedy sample each, right for all: answers 1, 1, 1, 2 and 2.
    problems = [replace(prompt(f"p{n}"), answer="1" if n < 3 else "2") for n in range(5)]
    task: Any = Steps(lambda *_: None)
    task.one_answer = one_answer
    figures = result_figures(task, problems, {"greedy": [[sample(right=True)] for _ in range(5)]})
    if not one_answer:  # any plan that works is right
        assert "constant_answer" not in figures and "accuracy_by_answer" not in figures["greedy"]
        return
    assert figures["constant_answer"] == {"answer": "1", "accuracy": 0.6}
    by_answer = {"1": {"problems": 3, "accuracy": 1.0}, "2": {"problems": 2, "accuracy": 1.0}}
    assert figures["greedy"]["accuracy_by_answer"] == by_answer
    assert figures["greedy"]["macro_accuracy"] is None  # fewer than MACRO_MINIMUM of each


def test_figures_repeat() -> None:
    def drawn() -> Sequence[Any]:
        return rows_of(ANSWERS)

    first, second = (result_figures(NumberTask(4), prompts(3), {"sampled": drawn()}) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
