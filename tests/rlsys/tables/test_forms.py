"""The one list of forms: docs/data.md, the readers and the messages agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlsys.data.rows import CHAINS, STEPS, SUPERVISED_IDS
from rlsys.tables.forms import FORMS, Form, Section, expected_columns, form_name, read_columns

SECTIONS: tuple[Section, ...] = ("sft", "preference", "task")
DOCS = Path(__file__).parents[3] / "docs" / "data.md"


def documented() -> list[tuple[str, str, dict[Section, bool]]]:
    """Return name, columns and the sections that read it, for every form in the table of docs/data.md."""
    text = DOCS.read_text(encoding="utf-8").partition("## Forms of rows")[2].partition("### ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [(name, columns, dict(zip(SECTIONS, map(bool, rest), strict=True))) for name, columns, *rest in cells]


def test_docs_list_every_form_in_the_order_of_the_code() -> None:
    forms = [(form.name, {section: section in form.reads for section in SECTIONS}) for form in FORMS]
    in_docs = [(name, reads) for name, _, reads in documented()]
    assert list(dict.fromkeys(map(str, forms))) == list(map(str, in_docs))


@pytest.mark.parametrize("form", FORMS)
def test_docs_name_the_columns_of_every_form(form: Form) -> None:
    reads = {section: section in form.reads for section in SECTIONS}
    [columns] = [columns for name, columns, others in documented() if (name, others) == (form.name, reads)]
    assert set(form.columns) <= set(re.findall(r"`([^`]+)`", columns))


@pytest.mark.parametrize(
    ("columns", "sft", "preference"),
    [
        (("prompt", "chosen", "rejected", "text"), ("text",), ("chosen", "rejected")),
        (("prompt", "completion", "label", "x"), ("prompt", "completion"), None),
        (("prompt", "completion", "messages"), ("prompt", "completion"), None),
        (("messages", "answer", "conversations"), ("messages",), None),
        (("prompt", "answer", "conversations"), ("conversations",), None),
        (("prompt",), None, None),
    ],
)
def test_the_first_form_that_a_section_reads_counts(
    columns: tuple[str, ...], sft: tuple[str, ...] | None, preference: tuple[str, ...] | None
) -> None:
    assert read_columns(columns, "sft") == sft
    assert read_columns(columns, "preference") == preference


def test_the_forms_of_token_ids_are_those_of_the_tables() -> None:
    tables = [tuple(name for name, column in layout.items() if not column.optional)
              for layout in (SUPERVISED_IDS, CHAINS, STEPS)]  # fmt: skip
    assert [form.columns for form in FORMS if "token ids" in form.name] == tables


def test_names_and_columns_for_messages() -> None:
    assert form_name(["x", "rejected", "chosen"]) == "preference with implicit prompt"
    assert form_name(["x"]) is None
    assert expected_columns("sft") == (
        "token_ids + loss_mask, or prompt + completion, or messages, or conversations, or text"
    )
