"""Schemas of the training tables. Each is declared once and used for writing and for reading.

Every table has text columns under the names that other trainers read, and columns with the exact token ids. `prompt`
is the text that the policy receives, including its chat template and special tokens. `completion`, `chosen` and
`rejected` are the text that follows, without the end token. A trainer that takes `prompt` as plain text must add no
template, and must append the end token to the completion. The id columns hold the tokens that were generated.
Encoding the text again can give other tokens, and a tokenizer that adds a beginning token adds a second one.

`chosen_mask` and `rejected_mask` are null, or False on the replies of an environment, which nothing trains. A loss mask
never holds them either.

A loss mask has one entry for each id of its column. True marks a token to train. In `supervised` these are all tokens
after the prompt. In `preferences` they are all tokens after the common prefix, because a chain is judged as a whole,
whichever model wrote it. In `step_preferences` they are the tokens that a model generated for the node, and in
`step_values` those of all nodes that no earlier row of the tree has. Tags and prefixes that the search put there are
left out, because the values do not judge a choice of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rlsys.tables.files import is_unicode


@dataclass(frozen=True, slots=True)
class Column:
    """Type of a column.

    Attributes:
        type: Arrow type in the files that are written. A file that is read may have a wider or narrower type.
        element: Python type of a value, or of the entries of a list.
        expected: Description for error messages.
        optional: Whether a file that is read may leave the column out, or hold nulls in it.
    """

    type: pa.DataType
    element: type
    expected: str
    optional: bool = False

    @property
    def read_type(self) -> pa.DataType:
        """Arrow type for the values of a JSONL file: integers have 64 bits there."""
        if self.element is not int:
            return self.type
        return pa.list_(pa.int64()) if pa.types.is_list(self.type) else pa.int64()

    def accepts_type(self, other: pa.DataType) -> bool:
        """Return whether a Parquet column of this Arrow type can be read."""
        if self.optional and pa.types.is_null(other):  # other programs write a column of nulls so
            return True
        if pa.types.is_list(self.type):
            is_list = pa.types.is_list(other) or pa.types.is_large_list(other)
            return is_list and _same_family(self.type.value_type, other.value_type)
        return _same_family(self.type, other)

    def accepts_value(self, value: Any) -> bool:
        """Return whether a value of a JSONL file has the type."""
        if pa.types.is_list(self.type) and self.element is float:  # numbers of JSON files keep their text
            return isinstance(value, list) and all(isinstance(entry, float) or type(entry) is int for entry in value)
        if pa.types.is_list(self.type):
            return isinstance(value, list) and set(map(type, value)) <= {self.element}
        return type(value) is self.element and (self.element is not str or is_unicode(value))


def _same_family(one: pa.DataType, other: pa.DataType) -> bool:
    families = (_is_int64, _is_text, pa.types.is_boolean, pa.types.is_floating)
    return any(is_member(one) and is_member(other) for is_member in families)


def _is_int64(kind: pa.DataType) -> bool:
    """Return whether every value of a type fits into int64."""
    return pa.types.is_integer(kind) and kind != pa.uint64()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


TEXT = Column(pa.string(), str, "text")
REAL = Column(pa.float64(), float, "a number")
COUNT = Column(pa.int32(), int, "a whole number")
VISITS = Column(pa.int32(), int, "a whole number or null", optional=True)
SCORES = Column(pa.list_(pa.float32()), float, "a list of numbers")
TEXTS = Column(pa.list_(pa.string()), str, "a list of texts")
REALS = Column(pa.list_(pa.float64()), float, "a list of numbers")
IDS = Column(pa.list_(pa.int32()), int, "a list of whole numbers")
MASK = Column(pa.list_(pa.bool_()), bool, "a list of truth values")
OPTIONAL_MASK = Column(pa.list_(pa.bool_()), bool, "a list of truth values or null", optional=True)


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of a table by name, in file order, and the columns that identify a row."""

    name: str
    columns: Mapping[str, Column]
    key: tuple[str, ...]

    def subset(self, *names: str) -> dict[str, Column]:
        """Return some of the columns, in the order of `names`."""
        return {name: self.columns[name] for name in names}


SUPERVISED = Table(
    "supervised",
    {
        "prompt": TEXT, "completion": TEXT, "prompt_id": TEXT, "token_ids": IDS, "loss_mask": MASK, "reward": REAL,
        "length": COUNT, "pattern": TEXT, "value": REAL,
    },
    key=("token_ids",),
)  # fmt: skip
PREFERENCES = Table(
    "preferences",
    {
        "prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "prompt_id": TEXT, "chosen_ids": IDS, "rejected_ids": IDS,
        "prompt_length": COUNT, "common_prefix": COUNT, "chosen_visits": VISITS, "rejected_visits": VISITS,
        "chosen_loss_mask": MASK, "rejected_loss_mask": MASK, "chosen_mask": OPTIONAL_MASK,
        "rejected_mask": OPTIONAL_MASK,
    },
    key=("chosen_ids", "rejected_ids"),
)  # fmt: skip
STEP_PREFERENCES = Table(
    "step_preferences",
    {
        "prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "prompt_id": TEXT, "prompt_ids": IDS, "chosen_ids": IDS,
        "rejected_ids": IDS, "chosen_value": REAL, "rejected_value": REAL, "chosen_visits": VISITS,
        "rejected_visits": VISITS, "chosen_loss_mask": MASK, "rejected_loss_mask": MASK,
    },
    key=("prompt_ids", "chosen_ids", "rejected_ids"),
)  # fmt: skip
STEP_VALUES = Table(
    "step_values",
    {
        "prompt": TEXT, "completions": TEXTS, "prompt_id": TEXT, "token_ids": IDS, "start": COUNT, "ends": IDS,
        "types": TEXTS, "values": REALS, "visits": IDS, "known": COUNT, "loss_mask": MASK,
    },
    key=("token_ids", "ends", "types"),
)  # fmt: skip
TABLES = (SUPERVISED, PREFERENCES, STEP_PREFERENCES, STEP_VALUES)
