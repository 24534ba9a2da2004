"""Rows of text and of messages that cannot be used: the message names the column at fault, in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text_rows import BAD, GOOD, SYSTEM, USER, reader, tokenizer, write

from rlsys.data.rows import Reader
from rlsys.errors import DataError

pytestmark = pytest.mark.heavy

BLANK: dict[str, Any] = {"role": "assistant", "content": " "}
NO_TEXT: dict[str, Any] = {"role": "assistant", "content": 3}
BOTH = "columns chosen and rejected"
# Rows with one wrong column, and that column.
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"chosen": "a", "rejected": None}, "column rejected: expected text or messages, found null"),
    ({"chosen": 3, "rejected": "a"}, "column chosen: expected text or messages, found int '3'"),
    ({"chosen": " ", "rejected": "a"}, "column chosen: expected text, found ' '"),
    ({"chosen": "ab", "rejected": "<|end|>"}, "column rejected: expected a text of two tokens or more"),
    ({"chosen": "<|end|>", "rejected": "ab"}, "column chosen: expected a text of two tokens or more"),
    ({"chosen": [USER, GOOD], "rejected": None}, "column rejected: expected text or messages, found null"),
    ({"chosen": [USER, GOOD], "rejected": [USER, NO_TEXT]}, "column rejected: message 2: expected text as content"),
    ({"chosen": [USER, NO_TEXT], "rejected": [USER, GOOD]}, "column chosen: message 2: expected text as content"),
    ({"chosen": [USER], "rejected": [USER, GOOD]}, "column chosen: expected text of the assistant, found a message of"),
    ({"chosen": [USER, GOOD], "rejected": [USER, BLANK]}, "column rejected: expected text of the assistant, found a b"),
    ({"chosen": [USER, GOOD], "rejected": [USER, USER, GOOD]}, "column rejected: expected text of the assistant"),
    ({"chosen": [GOOD], "rejected": [BAD]}, f"{BOTH}: expected a common beginning, the prompt, or a column prompt"),
    ({"chosen": "ab", "rejected": [GOOD]}, f"{BOTH}: expected a common beginning, the prompt, or a column prompt"),
    ({"chosen": [GOOD], "rejected": [USER, GOOD]}, f"{BOTH}: expected a common beginning"),
    ({"chosen": [SYSTEM, GOOD], "rejected": [SYSTEM, BAD]}, f"{BOTH}: expected a last message of the user"),
    ({"prompt": "Q", "chosen": "a", "rejected": 1.5}, "column rejected: expected text or messages, found float"),
    ({"prompt": "Q", "chosen": [GOOD], "rejected": [NO_TEXT]}, "column rejected: message 1: expected text as content"),
    ({"prompt": "Q", "chosen": "a", "rejected": "<|end|>"}, "column rejected: expected text, found '<|end|>'"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "column prompt: expected text, found ' '"),
    ({"prompt": 7, "chosen": [GOOD], "rejected": [BAD]}, "column prompt: expected text or messages, found int"),
    ({"prompt": [USER], "chosen": [BLANK], "rejected": [BAD]}, "column chosen: expected text of the assistant"),
    ({"prompt": [USER, NO_TEXT], "chosen": [GOOD], "rejected": [BAD]}, "column prompt: message 2: expected text as"),
    ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "column prompt: expected a last message of the"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "column rejected: expected text of the assistant"),
    ({"prompt": "Q", "completion": None}, "column completion: expected text or messages, found null"),
    ({"prompt": None, "completion": "a"}, "column prompt: expected text or messages, found null"),
    ({"prompt": None, "completion": [GOOD]}, "column prompt: expected text or messages, found null"),
    ({"prompt": None, "completion": [USER]}, "column completion: expected a message of the assistant, found none"),
    ({"prompt": [USER], "completion": [NO_TEXT]}, "column completion: message 1: expected text as content"),
    ({"prompt": [SYSTEM], "completion": [GOOD]}, "column prompt: expected a last message of the user"),
    ({"prompt": "Q", "completion": "<|end|>"}, "column completion: expected text, found '<|end|>'"),
    ({"messages": [USER, NO_TEXT]}, "column messages: message 2: expected text as content"),
    ({"conversations": [GOOD, USER]}, "column conversations: expected a message to reply to, found none"),
    ({"text": None}, "column text: expected text, found null"),
]


def read_all(row: dict[str, Any], path: str, used: Reader | None = None) -> None:
    used = used or reader()
    (used.pairs if "chosen" in row else used.supervised)(path, "x.path")


@pytest.mark.parametrize(("row", "fault"), FAULTS)
def test_the_message_names_the_column_that_is_wrong(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError) as caught:
        read_all(row, write(tmp_path, row))
    assert f"the first: row 1, {fault}" in caught.value.message


LONG: dict[str, Any] = {"role": "user", "content": "x" * 40}
LONG_REPLY: dict[str, Any] = {"role": "assistant", "content": "x" * 40}
TOO_LONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "x" * 40, "completion": "a"}, "column prompt: 40 tokens, actors"),
    ({"prompt": "Q", "completion": "x" * 40}, "column completion: 42 tokens with the prompt"),
    ({"prompt": "Q", "chosen": "a", "rejected": "x" * 40}, "column rejected: 42 tokens with the prompt"),
    ({"prompt": "x" * 40, "chosen": "a", "rejected": "b"}, "column prompt: 40 tokens, actors"),
    ({"chosen": "x" * 40 + "a", "rejected": "x" * 40 + "b"}, "columns chosen and rejected: 40 tokens, actors"),
    ({"chosen": [LONG, GOOD], "rejected": [LONG, BAD]}, "columns chosen and rejected: 44 tokens, actors"),
    ({"chosen": [USER, GOOD], "rejected": [USER, LONG_REPLY]}, "column rejected: 46 tokens with the prompt"),
    ({"messages": [LONG, GOOD]}, "column messages: 44 tokens, actors"),
    ({"messages": [USER, LONG_REPLY]}, "column messages: 46 tokens with the prompt"),
]


@pytest.mark.parametrize(("row", "fault"), TOO_LONG)
def test_the_column_that_is_too_long_is_named(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError) as caught:
        read_all(row, write(tmp_path, row), reader(longest=20))
    assert f"the first: row 1, {fault}" in caught.value.message


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "~", "completion": "aaa"}, "column prompt"),
        ({"prompt": "a", "completion": "~"}, "column completion"),
        ({"prompt": "a", "chosen": "aaa", "rejected": "~"}, "column rejected"),
        ({"prompt": "a", "chosen": "~", "rejected": "aaa"}, "column chosen"),
        ({"chosen": "~a", "rejected": "~b"}, "columns chosen and rejected"),
    ],
)
def test_the_column_with_a_token_outside_the_vocabulary_is_named(
    tmp_path: Path, row: dict[str, Any], column: str
) -> None:
    encoder = tokenizer()
    outside = encoder("~", add_special_tokens=False)["input_ids"][0]
    assert outside > max(encoder("ab", add_special_tokens=False)["input_ids"])
    path = write(tmp_path, row)
    small = Reader(encoder, outside, 100)
    with pytest.raises(DataError) as caught:
        read_all(row, path, small)
    assert caught.value.message.startswith(
        f"x.path {path}, row 1, {column}: expected token ids from 0 to {outside - 1}"
    )
