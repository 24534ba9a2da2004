"""The forms of rows, known by their columns: those of this project and those that other trainers document.

docs/data.md has the same list, with what each stage does with a form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

Section = Literal["sft", "preference", "task"]
"""Config section that names a data set."""


@dataclass(frozen=True, slots=True)
class Form:
    """Columns that give a row its meaning.

    Attributes:
        name: Name in messages and in docs/data.md.
        columns: Columns that a file of this form has.
        reads: Columns that a section reads, if it reads the form: completions last, or question and answer.
        judged: Whether the row says how good its completions are; then it has no right answer.
    """

    name: str
    columns: tuple[str, ...]
    reads: Mapping[Section, tuple[str, ...]] = field(default_factory=dict)
    judged: bool = False


_SIDES = ("chosen", "rejected")
_COMPLETION = ("prompt", "completion")
_CHAINS = ("chosen_ids", "rejected_ids", "prompt_length", "common_prefix")
_STEPS = ("prompt_ids", "chosen_ids", "rejected_ids")
FORMS = (
    Form("token ids", ("token_ids", "loss_mask"), {"sft": ("token_ids", "loss_mask")}),
    Form("pair of token ids", _CHAINS, {"preference": _CHAINS}),
    Form("pair of token ids", _STEPS, {"preference": _STEPS}),
    Form("preference", ("prompt", *_SIDES), {"preference": _SIDES}, judged=True),
    Form("preference with implicit prompt", _SIDES, {"preference": _SIDES}, judged=True),
    Form("stepwise supervision", ("prompt", "completions", "labels"), judged=True),
    Form("unpaired preference", (*_COMPLETION, "label"), {"sft": _COMPLETION}, judged=True),
    Form("verl", ("prompt", "reward_model"), {"task": ("prompt", "reward_model.ground_truth")}),
    Form("prompt and answer", ("prompt", "answer"), {"task": ("prompt", "answer")}),
    Form("prompt and answer", ("prompt", "ground_truth"), {"task": ("prompt", "ground_truth")}),
    Form("prompt and answer", ("prompt", "solution"), {"task": ("prompt", "solution")}),
    Form("prompt-completion", _COMPLETION, {"sft": _COMPLETION, "task": _COMPLETION}),
    Form("messages and answer", ("messages", "answer"), {"sft": ("messages",), "task": ("messages", "answer")}),
    Form(
        "messages and answer",
        ("conversations", "answer"),
        {"sft": ("conversations",), "task": ("conversations", "answer")},
    ),
    Form("language modelling", ("messages",), {"sft": ("messages",), "task": ("messages", "messages")}),
    Form(
        "language modelling",
        ("conversations",),
        {"sft": ("conversations",), "task": ("conversations", "conversations")},
    ),
    Form("language modelling", ("text",), {"sft": ("text",)}),
    Form("question and answer", ("question", "answer"), {"task": ("question", "answer")}),
    Form("prompt-only", ("prompt",)),
    Form("instruction", ("instruction", "output")),
    Form("instruction", ("instruction", "response")),
)
"""All forms. Of several that a file has, the first one that a section reads counts."""


def forms_of(columns: Collection[str]) -> list[Form]:
    """Return the forms whose columns all exist, in the order of `FORMS`."""
    return [form for form in FORMS if set(form.columns) <= set(columns)]


def form_name(columns: Collection[str]) -> str | None:
    """Return the name of the first form whose columns all exist, or None."""
    return next((form.name for form in forms_of(columns)), None)


def read_columns(columns: Collection[str], section: Section) -> tuple[str, ...] | None:
    """Return the columns that a section reads of a file, or None if it reads none of its forms."""
    return next((form.reads[section] for form in forms_of(columns) if section in form.reads), None)


def expected_columns(section: Section) -> str:
    """Return the columns of all forms that a section reads, for messages."""
    known = dict.fromkeys(form.reads[section] for form in FORMS if section in form.reads)
    return ", or ".join(" + ".join(dict.fromkeys(columns)) for columns in known)
