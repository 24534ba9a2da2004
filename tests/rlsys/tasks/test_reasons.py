"""The reason of a wrong answer: what was read, what was expected, and what is wrong with the place of the answer."""

from __future__ import annotations

import pytest

from rlsys.config.tasks import LetterCountConfig
from rlsys.evaluation.figures import QUOTED
from rlsys.tasks.answers.judge import Judge
from rlsys.tasks.letter_count.task import LetterCountTask
from rlsys.tasks.reasons import MAX_QUOTED_CHARS, quoted
from rlsys.tasks.tags import answer_fault, final_answer
from rlsys.types import Problem


@pytest.mark.parametrize(
    ("completion", "fault"),
    [
        ("2", ""),
        ("2</answer>", "</answer> without <answer>"),
        ("<thinking>a</thinking><answer></thinking><answer>0</answer>", "an earlier <answer> is not closed"),
        ("<answer>2", "it is not closed"),
        ("</answer><answer>2", "it is not closed"),
        ("<answer>2</answer>.", "text follows it"),
        ("<answer>1</answer><answer>2</answer>", "more than one <answer>"),
        ("<answer>2</answer></answer>", "more than one </answer>"),
    ],
)
def test_a_completion_without_a_final_answer_says_which_rule_it_breaks(completion: str, fault: str) -> None:
    assert final_answer(completion) is None
    assert answer_fault(completion) == "no final <answer>" + (f": {fault}" if fault else "")


def test_generated_tasks_say_what_was_read() -> None:
    problem = Problem(problem_id="p", question="count a in abca", answer="2")
    verdict = LetterCountTask(LetterCountConfig(), 0).verify(problem, "<answer>6</answer>")
    assert verdict.detail == "read '6', expected '2'"


@pytest.mark.parametrize(
    ("reference", "completion", "detail"),
    [
        ("4", "<answer>6</answer>", "another value; read '6', expected '4'"),
        ("(B)", "<answer>C</answer>", "another choice; read 'C', expected '(B)'"),
        ("18", "<answer>either of them</answer>", "no answer: the answer is not one value: 'either of them'"),
        (
            "18",
            "<ask>fig</ask>",
            "no answer: no <answer>, box or lead-in, and the text is not one value: '<ask>fig</ask>'",
        ),
    ],
)
def test_the_judge_says_what_was_read(reference: str, completion: str, detail: str) -> None:
    assert Judge().verdict(reference, completion).detail == detail


@pytest.mark.parametrize("text", ["6", "it's", "f'(x)", 'say "it\'s"', "a\n\x1b[2Jb", "x" * 10_000, "'", "\u202eabc"])
def test_a_quoted_text_is_short_and_left_out_of_the_groups_of_reasons(text: str) -> None:
    written = quoted(text)
    assert len(written) <= MAX_QUOTED_CHARS + 2 and written.isprintable()
    assert QUOTED.sub("...", f"read {written}, expected {quoted('4')}") == "read ..., expected ..."
