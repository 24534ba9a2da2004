"""The judge on public data sets: every reference verifies against itself, and none against a perturbed one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from rlsys.tasks.answers.judge import Judge

DATA = Path(os.environ.get("RLSYS_DATA", ""))
SETS = {"math500.jsonl": 500, "aime24.jsonl": 30, "gsm8k_test.jsonl": 1319}
FORMS = ("<answer>%s</answer>", "<answer>%s</answer>.", r"So it is \boxed{%s}.", "$%s$", "%s", "The answer is %s.")
JUDGE = Judge()
PARTS = 4  # of the pairs of references; all but the first only in the long tests

pytestmark = pytest.mark.heavy


def references(name: str) -> list[str]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"RLSYS_DATA names no folder with {name}")
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    return [answer.split("#### ")[-1] for answer in answers]


def perturbed(reference: str) -> list[str]:
    """Return other answers of the same form: another last digit, another sign, and one more."""
    others = [f"-({reference})", f"{reference} + 1"]
    digits = list(re.finditer(r"\d", reference))
    if digits:
        start, end = digits[-1].span()
        others.append(f"{reference}1")
        others.append(f"{reference[:start]}{(int(digits[-1][0]) + 1) % 10}{reference[end:]}")
    # Nothing changes for 0 and plus-minus signs, and a choice or a word has no sign.
    keeps = reference == "0" or r"\pm" in reference
    return others[keeps:]


@pytest.mark.parametrize("name", SETS)
def test_references_verify_against_themselves(name):
    texts = references(name)
    assert len(texts) == SETS[name]
    failed = [
        (text, form) for text in texts for form in FORMS if not JUDGE.verdict(text, form % (text,)).reward
    ]  # fmt: skip
    assert failed == []
    assert [text for text in texts if JUDGE.reference_fault(text)] == []


@pytest.mark.parametrize("name", SETS)
def test_perturbed_references_are_wrong(name):
    accepted = [
        (text, other)
        for text in references(name)
        for other in perturbed(text)
        for form in FORMS
        if JUDGE.verdict(text, form % (other,)).reward
    ]
    assert accepted == []


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, PARTS))])
def test_references_of_other_problems_are_wrong(part: int) -> None:
    texts = list(dict.fromkeys(references("math500.jsonl")))
    accepted = {
        (one, other)
        for one in texts[part::PARTS]
        for other in texts
        if one != other and JUDGE.verdict(one, f"<answer>{other}</answer>").reward
    }
    different_notations = {
        pair
        for one, other in [
            ("5", "x=5"), (r"\frac{1}{4}", r"\frac14"), (r"\frac{4}{3}", r"\frac43"), ("\\$36", "36"),
            (r"2\sqrt{5}", r"2 \sqrt{5}"), ("10,\\!080", "10080"), (r"90^\circ", "90"), (r"120^\circ", "120"),
            (r"55^\circ", "55"), (r"36^\circ", "36"),
            (r"145^\circ", "145"), (r"30^\circ", "30"), ("-2,1", "1,-2"),
            ("15", r"15\mbox{ cm}^2"), (r"\pi", r"180^\circ"),
        ]
        for pair in ((one, other), (other, one))
    }  # fmt: skip
    assert accepted - different_notations <= {("40_9", "40")}  # an answer without a base has that of the reference
    assert accepted & different_notations


def test_pairs_made_after_public_reports():
    forms = {"boxed": r"So the answer is $\boxed{%s}$.", "tag": "<answer>%s</answer>", "text": "%s"}
    path = DATA / "answer_pairs.jsonl"
    if not path.is_file():
        pytest.skip("RLSYS_DATA names no folder with answer_pairs.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 319
    verdicts = [JUDGE.verdict(row["reference"], forms[row["form"]] % (row["answer"],)) for row in rows]
    assert [row for row, verdict in zip(rows, verdicts, strict=True) if bool(verdict.reward) != row["right"]] == []
