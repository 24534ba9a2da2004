"""Forms of data sets, known by their columns: those of this project and those that other trainers document."""

from __future__ import annotations

from collections.abc import Iterable

_FORMS = (
    ("id", {"token_ids", "loss_mask"}),
    ("pair of ids", {"chosen_ids", "rejected_ids"}),
    ("preference", {"prompt", "chosen", "rejected"}),
    ("preference with implicit prompt", {"chosen", "rejected"}),
    ("stepwise supervision", {"prompt", "completions", "labels"}),
    ("unpaired preference", {"prompt", "completion", "label"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("language modelling", {"messages"}),
    ("language modelling", {"conversations"}),
    ("language modelling", {"text"}),
    ("verl", {"prompt", "reward_model"}),
    ("question and answer", {"question", "answer"}),
    ("prompt-only", {"prompt"}),
)


def form_name(columns: Iterable[str]) -> str | None:
    """Return the name of the first form whose columns all exist, or None."""
    names = set(columns)
    return next((form for form, needed in _FORMS if needed <= names), None)
