"""The judge of answers: pairs of every kind, perturbed references, places of the answer, and what is undecided."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.tasks.answers.judge import Judge
from rlsys.tasks.answers.reading.units import SYMBOL_UNITS
from rlsys.tasks.answers.references import reference_note

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "pairs.jsonl").read_text().splitlines()]
KINDS = sorted({row["kind"] for row in PAIRS})
FORMS = ("<answer>%s</answer>", "<answer>%s</answer>. Done!", r"So it is $\boxed{%s}$.")
JUDGE = Judge()


def verdict(reference: str, completion: str, **fields):
    return Judge(**fields).verdict(reference, completion)


def faults(kind: str, side: str, reward: float) -> list[tuple[str, str, str]]:
    """Return the pairs of a kind that do not get a reward."""
    return [
        (row["reference"], answer, result.detail)
        for row in PAIRS
        if row["kind"] == kind
        for answer in row[side]
        for form in FORMS
        if (result := JUDGE.verdict(row["reference"], form % (answer,))).reward != reward
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers(kind):
    assert faults(kind, "right", 1.0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_answers(kind):
    assert faults(kind, "wrong", 0.0) == []


def perturbed(number: Fraction) -> list[Fraction]:
    return [number + 1, number - 1, -number, number * 10, number / 10, number + Fraction(1, 7), number * number + 2]


NUMBERS = st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**4)
TEMPLATES = (
    "%s",
    "x = %s",
    r"\frac{%s}{1}",
    "(%s, 5)",
    r"\{%s, 5\}",
    "[%s, \\infty)",
    r"%s\pi",
    r"%s + \sqrt{2}",
    "%s cm",
    "%s x + y",
    "%s h^2",
    "%s g t + s",
    r"\frac{%s m}{n}",
)


@given(number=NUMBERS, template=st.sampled_from(TEMPLATES), place=st.integers(0, 6))
@settings(deadline=None)
def test_a_perturbed_number_is_wrong_in_every_kind(number, template, place):
    other = perturbed(number)[place]
    reference, answer = (template % f"({value})" for value in (number, other))
    assert verdict(reference, f"<answer>{reference}</answer>").reward == 1
    assert verdict(reference, f"<answer>{answer}</answer>").reward == float(number == other)


@pytest.mark.parametrize("letter", sorted(SYMBOL_UNITS - {"Ω"}))
@pytest.mark.parametrize("template", ["8 %s^2", "x %s", r"\frac{1}{2} %s", "3 x^2 %s", r"2 \pi r %s", "5 %s + 1"])
def test_a_letter_of_a_unit_may_be_a_variable(letter, template):
    spaced, glued, none = template % letter, (template % letter).replace(" ", ""), template.split("%s")[0]
    if "\\pi" in template:
        glued = rf"2\pi {letter}r"
    assert verdict(spaced, f"<answer>{glued}</answer>").reward == 1
    assert verdict(glued, f"<answer>{spaced}</answer>").reward == 1
    assert verdict(spaced, f"<answer>{none}</answer>").reward == 0


@given(digits=st.integers(1, 10**7), exponent=st.integers(-300, 300), change=st.integers(-9, 9))
@settings(deadline=None)
def test_numbers_of_all_sizes(digits, exponent, change):
    answer = f"<answer>{digits + change}e{exponent}</answer>"
    assert verdict(f"{digits}e{exponent}", answer).reward == float(change == 0)


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_text_is_judged_without_an_exception(text):
    JUDGE.verdict("18", text)
    JUDGE.verdict(text, f"<answer>{text}</answer>")


PLACES = [
    ("the last tag counts", "<answer>17</answer> no, <answer>18</answer>", 1, True),
    ("the last tag counts", "<answer>18</answer> no, <answer>17</answer>", 0, True),
    ("an echo of the prompt", "Write <answer>...</answer>. Well: <answer>18</answer>", 1, True),
    ("an open tag is none", "<answer>18", 0, False),
    ("an open tag after a complete one", "<answer>18</answer> <answer>17", 1, True),
    ("a tag in a tag", "<answer><answer>18</answer></answer>", 1, True),
    ("text after the tag", "<answer>18</answer>. I am sure.", 1, True),
    ("an empty tag", "18 <answer></answer>", 0, False),
    ("a tag before a box", r"\boxed{17} <answer>18</answer>", 1, True),
    ("words in a tag", "<answer>no idea</answer>", 0, False),
    ("a lead-in in a tag", "<answer>The answer is 18.</answer>", 1, True),
    ("a box in a tag", r"<answer>\boxed{18}</answer>", 1, True),
    ("a box beside a number in a tag", r"<answer>17 \boxed{18}</answer>", 0, True),
    ("a box that is denied in a tag", r"<answer>It is not \boxed{18}</answer>", 0, False),
    ("the last box", r"\boxed{17}, no: \boxed{18}", 1, True),
    ("the last box", r"\boxed{18}, no: \boxed{17}", 0, True),
    ("boxes side by side are a list", r"\boxed{17} \boxed{18}", 0, True),
    ("boxes side by side are a list", r"$\boxed{17}$ or $\boxed{18}$", 0, True),
    ("the same box twice", r"\boxed{18} and \boxed{18}", 1, True),
    ("a box in a box", r"\boxed{\boxed{18}}", 1, True),
    ("an open box", r"it is \boxed{18", 0, False),
    ("an empty box", r"\boxed{}", 0, False),
    ("a lead-in", "So the answer is 18.", 1, True),
    ("a lead-in", "Thus the final answer is: $18$", 1, True),
    ("a lead-in", "**Final Answer:** 18", 1, True),
    ("a lead-in", "**Final Answer: 18**", 1, True),
    ("a lead-in", "## Final Answer\n\n18", 1, True),
    ("a lead-in", "x\n#### 18", 1, True),
    ("a lead-in", "Answer: 18\n\nIt is the sum.", 1, True),
    ("a lead-in", "The answer is 18. It is the sum.", 1, True),
    ("a lead-in", "The correct answer is 18 dollars.", 1, True),
    ("a lead-in", "*Answer:* 18", 1, True),
    ("a lead-in in a tag", "<answer>**Answer:** 18</answer>", 1, True),
    ("an equation after so", "So x = 18", 1, True),
    ("a label", "Total: 18", 1, True),
    ("a label", r"\boxed{\text{Total: }18}", 1, True),
    ("a label after a lead-in", "The answer is Total: 18", 1, True),
    ("labels of two values", "Total: 17. Or maybe 18.", 0, False),
    ("a chain of names", "So x = y = 18.", 1, True),
    ("the last lead-in", "The answer is 18. Wait. The answer is 17.", 0, True),
    ("a lead-in with two answers", "The answer is 18 or 19.", 0, True),
    ("a lead-in that denies", "The answer is not 18.", 0, False),
    ("an answer alone", "18", 1, True),
    ("an answer alone", " $x = 18$ \n", 1, True),
    ("an answer alone", "**18**", 1, True),
    ("a number beside words", "I computed 3*6 and get 18", 0, False),
    ("a number beside words", "so 18? no: 19", 0, False),
    ("a formula beside words", "so we get $18$", 0, False),
    ("a number on the last line", "first 3, then 6\n18", 0, False),
    ("no answer", "I do not know", 0, False),
    ("no answer", "", 0, False),
    ("the reasoning is no place", "<think>hmm</think>\n\n18", 1, True),
    ("the reasoning is no place", "<think>the answer is 17</think>18", 1, True),
    ("the reasoning is no place", "<think><answer>18</answer></think> I am not sure.", 0, False),
    ("the reasoning is no place", r"so \boxed{17}</think>\boxed{18}", 1, True),
    ("the reasoning is no place", r"<think>\boxed{18}</think>", 0, False),
    ("the reasoning is no place", "<think>a</think><answer>17</answer><think>b</think>The answer is 18.", 1, True),
    ("the reasoning is no place", "<thinking>The answer is 18.</thinking> It is 17", 0, False),
    ("the reasoning is no place", "[THINK]17[/THINK]18", 1, True),
    ("a tag in another case", "<Answer>18</Answer>", 1, True),
    ("a box without braces", r"so $\boxed 18$.", 1, True),
    ("a box without braces", r"so \boxed 18 + 1", 0, False),
    ("an end token", "The answer is 18<|im_end|>", 1, True),
    ("an end token", "18</s>", 1, True),
    ("too long", f"<answer>{'1' * 2000}</answer>", 0, False),
]


@pytest.mark.parametrize(("name", "completion", "reward", "answered"), PLACES)
def test_the_place_of_the_answer(name, completion, reward, answered):
    result = JUDGE.verdict("18", completion)
    assert (result.reward, result.answered) == (reward, answered), result


@pytest.mark.parametrize(
    "answer",
    [
        r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "(-∞,3) union (5,∞)", r"\begin{array}{c}1\end{array} + \foo",
        r"\begin{Vmatrix}1\end{Vmatrix}", "xy", r"(1,2) intersect \{3\}", r"\left(1,2\right) union \{3\}",
    ],
)  # fmt: skip
def test_pure_mathematics_is_an_answer(answer):
    result = JUDGE.verdict("x - 2", f"<answer>{answer}</answer>")
    assert (result.reward, result.answered) == (0, True), result


def test_an_open_box_is_ignored():
    assert JUDGE.verdict("18", r"\boxed{18} and \boxed{19").reward == 1


LONG = 8192


def test_only_the_sum_of_a_reference_is_evaluated():
    total = r"\sum_{k=1}^{10} k"
    assert verdict(total, r"\boxed{55}").reward == 1
    assert verdict("55", rf"\boxed{{{total}}}").reward == 0


HARD = {
    "spaces": "the answer" + " " * LONG,
    "lines": "\n" * LONG + "final answer",
    "boxes": r"\boxed{" * 1000 + "18" + "}" * 1000,
    "open boxes": r"\boxed{" * 1000,
    "open tags": "<answer>" * 1000,
    "answers": "answer: " * 1000,
    "stars": f"<answer>{'*' * 1000}</answer>",
    "braces": f"<answer>{'{' * 1000}</answer>",
    "brackets": f"<answer>{'(' * 500}1{')' * 500}</answer>",
    "an integral": r"\boxed{\int_0^1 x^{99} \sin(x) dx}",
    "an integral without a form": r"\boxed{\int_0^9 \frac{\sin(x^9)}{\ln(x+2)} dx}",
    "a series": r"\boxed{\sum_{n=1}^{\infty} \frac{\sin(n)}{n^2}}",
    "a tower": "<answer>9**9**9**9</answer>",
    "powers of sums": "<answer>" + "(" * 20 + "x+1" + ")^{9}" * 20 + "</answer>",
    "factorials": f"<answer>9{'!' * 500}</answer>",
    "factorials of factorials": f"<answer>{'(' * 30}9{')!' * 30}</answer>",
    "a long sum": f"<answer>{'+'.join(['x^{99}'] * 90)}</answer>",
    "sines": "<answer>" + r"\sin(" * 30 + "x" + ")" * 30 + "</answer>",
    "plus-minus": f"<answer>{'±1' * 100}</answer>",
    "plus-minus in sets": "<answer>" + r"±1=\{" * 60 + "1" + r"\}" * 60 + "</answer>",
    "labels": f"<answer>{'AB=' * 300}1</answer>",
    "open brackets": f"<answer>{']1,2[ or ' * 80}]1,2[</answer>",
    "open brackets without ends": f"<answer>{']1' * 300}</answer>",
    "combinations": f"<answer>{'C(9,3)+' * 60}1</answer>",
    "nested combinations": f"<answer>{'C(' * 200}9{',3)' * 200}</answer>",
    "rounded values": f"<answer>{'2/3≈' * 100}1</answer>",
    "words before a colon": f"<answer>{'Total of all ' * 70}: 18</answer>",
    "a list": f"<answer>{','.join(map(str, range(250)))}</answer>",
    "a matrix": r"<answer>\begin{pmatrix}" + "1&" * 400 + r"1\end{pmatrix}</answer>",
    "commas": f"<answer>{',' * 1000}</answer>",
    "signs": f"<answer>{'-' * 398}18</answer>",
    "a tower of powers": f"<answer>{'^'.join(['1'] * 199)}</answer>",
    "an exponent": "<answer>1e999999999</answer>",
}


@pytest.mark.parametrize("name", HARD)
def test_hard_texts_are_judged_in_bounded_time(name):
    start = time.process_time()
    verdicts = [
        JUDGE.verdict(reference, HARD[name])
        for reference in ("18", "x^2 + 1", "1, 2, 3", "Evelyn", r"\sum_{k=1}^{9} k")
    ]
    assert time.process_time() - start < 1  # some 10 ms on a free core
    assert name in ("boxes", "signs") or not any(verdict.reward for verdict in verdicts)


@pytest.mark.parametrize(
    "reference",
    [
        r"\sum_{k=1}^{10^6} \frac{1}{k}", r"\sum_{k=1}^{10^{10^{10}}} k", r"\sum_{k=1}^{n} k", r"\prod_{k=1}^{900} k^k",
        r"\sum_{k=1}^{9} x^k y^k z^k", r"\sum_{k=1}^{\infty} \frac{1}{k}", r"\int_0^9 \frac{\sin(x^9)}{\ln(x+2)} dx",
        r"\int_0^\infty x dx", r"\lim_{x \to \infty} x^{99} e^{x}", r"\int_0^1 \frac{1}{x} dx",
        r"\sum_{k=1}^{900} k^{-900}",
    ],
)  # fmt: skip
def test_the_work_for_a_sum_is_bounded(reference):
    start = time.process_time()
    rewards = [verdict(reference, f"<answer>{answer}</answer>").reward for answer in ("5", "(x+y+z)^{99}", "n^{99}")]
    assert time.process_time() - start < 4
    assert rewards == [0, 0, 0]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (r"\sum_{k=1}^{10^6} \frac{1}{k}", "too many terms"),
        (r"\int_0^x t dt", "with a symbol"),
        (r"\sum_{k=1}^{\infty} \frac{1}{k}", "uncertain"),
        (r"x = \int_0^1 \frac{1}{t} dt", "uncertain"),
        (r"\int_0^1 t dt", None),
        (r"\sum_{k=1}^{n} k", None),
    ],
)
def test_a_reference_that_cannot_be_evaluated_is_reported(reference, reason):
    fault = JUDGE.reference_fault(reference)
    assert fault is None if reason is None else reason in (fault or ""), fault


def test_boxes_side_by_side_for_a_list():
    assert verdict("1,2", r"the solutions are \boxed{1} and \boxed{2}").reward == 1


@pytest.mark.parametrize("completion", ["16 - 3 = 13, 13 + 5 = 18, and then she also", "18", "<answer>18</answer> so"])
def test_a_chain_that_was_cut_off_has_no_answer(completion):
    result = JUDGE.verdict("18", completion, finished=False)
    assert (result.reward, result.answered) == (0, False)
    assert result.detail == "no answer: the completion was cut off"


def test_a_key_accepts_chains_that_were_cut_off():
    judge = Judge(accept_cut_off=True)
    assert judge.verdict("18", "<answer>18</answer> so", finished=False).reward == 1
    assert not judge.verdict("18", "13 + 5 = 18, and then she also", finished=False).answered


STRICTNESS = [
    # reference, answer, reward for text, value, lenient
    ("18", "**18**.", 1, 1, 1),
    ("Yes", "yes", 1, 1, 1),
    ("1/2", "0.5", 0, 1, 1),
    ("90%", "90", 0, 0, 1),
    ("90", "90%", 0, 0, 1),
    ("90", "80%", 0, 0, 0),
    (r"\pi", "3.14", 0, 0, 1),
    (r"\pi", "3.15", 0, 0, 0),
    (r"\pi", "3.1", 0, 0, 0),
    ("18", "18.1", 0, 0, 0),
]


@pytest.mark.parametrize(("reference", "answer", "text", "value", "lenient"), STRICTNESS)
def test_strictness(reference, answer, text, value, lenient):
    completion = f"<answer>{answer}</answer>"
    rewards = [verdict(reference, completion, strictness=name).reward for name in ("text", "value", "lenient")]
    assert rewards == [text, value, lenient]


def test_the_tolerance_is_relative_and_below_half_a_digit():
    def reward(reference, answer, tolerance):
        return verdict(reference, f"<answer>{answer}</answer>", relative_tolerance=tolerance).reward

    assert [reward("2.500", "2.5004", tolerance) for tolerance in (0, 1e-4, 1e-3)] == [0, 0, 1]
    assert reward("2.500", "2.5005", 0.1) == 0  # half a unit of the last digit
    assert reward("2.5", "2.54", 0.1) == 1
    assert reward("25", "25.01", 0.1) == 0  # no decimal
    assert reward("1.0e-20", "1.04e-20", 0.1) == 1
    assert reward("1.0e-20", "1.06e-20", 0.1) == 0


def test_what_cannot_be_decided_says_why():
    result = verdict(r"1, 2, \ldots, n", r"<answer>1, 2, \ldots, n+1</answer>")
    assert (result.reward, result.answered) == (0, True)
    assert result.detail.startswith(r"undecided: the reference can only be compared as text: the command \ldots; read ")
    assert verdict(r"1, 2, \ldots, n", r"<answer>$1,2,\ldots,n$</answer>").reward == 1
    tower = verdict("9^{9^{9^9}}", "<answer>9^{9^{9^8}}</answer>")
    assert tower.detail.startswith("undecided: a power that is too large; read ")
    assert verdict("18", "<answer>17 18</answer>").detail.startswith("the answer is not readable: ")


def test_references_that_cannot_be_verified():
    references = [(1, "18"), (2, r"1, 2, \ldots, n"), (3, "."), (4, r"\text{Evelyn}"), (5, "so x</answer> is 1")]
    assert [reference for _, reference in references if JUDGE.reference_fault(reference)] == [
        references[place][1] for place in (1, 2, 4)
    ]
    note = reference_note(JUDGE, references)
    assert note is not None
    assert note.startswith("3 of 5 references cannot be verified by value, the first: row 2 '1, 2,")
    assert reference_note(JUDGE, references[:1]) is None
    assert "of 2000 sampled of 4000 references" in (
        reference_note(JUDGE, [(i, r"\ldots 1") for i in range(4000)]) or ""
    )
