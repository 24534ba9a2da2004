"""Rows of text or of messages as token ids. The forms are those that other trainers document; see docs/data.md.

A text is encoded as it is. Messages go through the chat template once: the prompt exactly as for sampling, and the
completion is what the template renders after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from rlsys.errors import DataError
from rlsys.models.chat import encode_prompt, end_token_id
from rlsys.models.chat_template import cut_after_end, encode_reply, reply_header
from rlsys.sequences import common_prefix_length
from rlsys.tables.arrow import BATCH
from rlsys.tables.files import Row, described, is_unicode
from rlsys.tables.messages import (
    Conversation,
    check_prompt,
    check_reply,
    conversation,
    is_conversation,
    refuse_media,
    split_reply,
    unfolded,
)
from rlsys.types import Message

_PAIR = "columns chosen and rejected"
_COMMON = "expected a common beginning, the prompt, or a column prompt; found none"


@dataclass(slots=True, kw_only=True)
class EncodedRows:
    """Token ids of consecutive rows of a file.

    Attributes:
        numbers: Number of each row in the file.
        prompts: Prompt of each row.
        places: For each row, the columns of the prompt and of each side, for messages.
        sides: For each column with a completion, the tokens after the prompt of each row, the end token last.
        bad: Reason why a row cannot be used, by its number.
        unwanted: Number of rows whose label is false.
        bare: Number of rows of plain text that lack what the chat template writes before a reply.
    """

    numbers: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    places: list[tuple[str, ...]] = field(default_factory=list)
    sides: list[list[list[int]]] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    unwanted: int = 0
    bare: int = 0


@dataclass(frozen=True, slots=True)
class _Texts:
    """A prompt as plain text and its completions. Without a prompt, the completions are whole texts.

    Attributes:
        places: Columns of the prompt and of each completion, for messages.
    """

    prompt: str | None
    completions: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Chat:
    """A conversation and the messages of its replies. `places` are as in `_Texts`."""

    prompt: Conversation
    replies: tuple[Conversation, ...]
    places: tuple[str, ...]


Parsed = _Texts | _Chat


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Encoder of rows for one policy.

    Attributes:
        tokenizer: Hugging Face tokenizer of the policy.
        end_tokens: Tokens that end a turn, besides the tokenizer's own.
        columns: Columns of the completions: those that `read_columns` returns.
    """

    tokenizer: Any
    end_tokens: frozenset[int]
    columns: tuple[str, ...]

    def encode(self, rows: Iterator[Row]) -> Iterator[EncodedRows]:
        """Yield the token ids of all rows, in batches."""
        header = reply_header(self.tokenizer)
        while batch := list(islice(rows, BATCH)):
            result = EncodedRows(sides=[[] for _ in self._sides])
            parsed = [(row.number, each) for row in batch if (each := self._parsed(row, result)) is not None]
            plain = [text for _, each in parsed if isinstance(each, _Texts) for text in self._plain(each)]
            encoded = iter(self._tokens(plain))
            result.bare = sum(isinstance(each, _Texts) and header not in self._plain(each)[0] for _, each in parsed)
            for number, each in parsed:
                ids = [next(encoded) for _ in self._plain(each)] if isinstance(each, _Texts) else []
                self._collect(result, number, each, ids)
            yield result

    @property
    def _sides(self) -> tuple[str, ...]:
        """Columns with completions, without the prompt."""
        return self.columns[-2:] if "rejected" in self.columns else self.columns[-1:]

    def _parsed(self, row: Row, result: EncodedRows) -> Parsed | None:
        """Return the texts or messages of a row. Otherwise add it to the result as bad or unwanted."""
        if isinstance(row.values, str):
            result.bad[row.number] = row.values
            return None
        try:
            if "completion" in self.columns and _label(row.values) is False:
                result.unwanted += 1
                return None
            refuse_media(row.values)
            parse = _parsed_pair if "rejected" in self.columns else _parsed_row
            return parse(self._unfolded(row.values), self.columns)
        except DataError as error:
            result.bad[row.number] = error.message
            return None

    def _unfolded(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the values of a row; messages that are given as JSON text are lists."""
        values = dict(given)
        for name in ("prompt", *self.columns) if self.columns != ("text",) else ():
            with _at(f"column {name}"):
                values[name] = unfolded(values.get(name))
        return values

    def _plain(self, texts: _Texts) -> tuple[str, ...]:
        return texts.completions if texts.prompt is None else (texts.prompt, *texts.completions)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _collect(self, result: EncodedRows, number: int, parsed: Parsed, ids: list[list[int]]) -> None:
        """Add a row to the result, or the reason why it cannot be used."""
        try:
            if isinstance(parsed, _Chat):
                prompt, sides = self._chat(parsed)
            elif parsed.prompt is None:
                prompt, sides = self._whole(parsed, ids)
            else:
                prompt, sides = self._prompt_and_completions(parsed, ids)
        except DataError as error:
            result.bad[number] = error.message
            return
        result.numbers.append(number)
        result.prompts.append(prompt)
        result.places.append(parsed.places)
        for column, side in zip(result.sides, sides, strict=True):
            column.append(side)

    def _prompt_and_completions(self, texts: _Texts, ids: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        end = end_token_id(self.tokenizer)
        for number, (place, text, tokens) in enumerate(zip(texts.places, self._plain(texts), ids, strict=True)):
            # An end token right after the prompt would teach the policy to give no answer.
            if not tokens or (number > 0 and tokens == [end]):
                raise DataError(f"{place}: expected text, found {text[:40]!r}")
        return ids[0], [self._ended(completion) for completion in ids[1:]]

    def _whole(self, texts: _Texts, ids: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        """Return the part that all texts begin with, and the rests. One text begins with its first token."""
        sides = [self._ended(self._begun(tokens)) for tokens in ids]
        for place, side in zip(texts.places[1:], sides, strict=True):
            if len(side) < 2:
                raise DataError(f"{place}: expected a text of two tokens or more")
        start = 1 if len(sides) == 1 else common_prefix_length(*(np.array(side, dtype=np.int32) for side in sides))
        if start == 0:
            raise DataError(f"{_PAIR}: {_COMMON}")
        return sides[0][:start], [side[start:] for side in sides]

    def _chat(self, chat: _Chat) -> tuple[list[int], list[list[int]]]:
        ends, sides = {end_token_id(self.tokenizer), *self.end_tokens}, []
        with _at(chat.places[0]):
            prompt = encode_prompt(self.tokenizer, chat.prompt)
        for place, reply in zip(chat.places[1:], chat.replies, strict=True):
            with _at(place):
                side = encode_reply(self.tokenizer, chat.prompt, reply)
            sides.append(self._ended(cut_after_end(self.tokenizer, side, ends), ends))
        return prompt, sides

    def _ended(self, token_ids: list[int], ends: set[int] | None = None) -> list[int]:
        """Return tokens with one end token at the end."""
        end = end_token_id(self.tokenizer)
        return token_ids if token_ids and token_ids[-1] in (ends or {end}) else [*token_ids, end]

    def _begun(self, token_ids: list[int]) -> list[int]:
        """Return a whole text with the beginning token that the tokenizer gives to every text."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        if begin is None or token_ids[:1] == [begin] or self.tokenizer("a")["input_ids"][:1] != [begin]:
            return token_ids
        return [begin, *token_ids]


def _parsed_row(values: Mapping[str, Any], columns: Sequence[str]) -> Parsed:
    if columns == ("text",):
        with _at("column text"):
            return _Texts(None, (_plain(values.get("text"), "text"),), ("column text",) * 2)
    if len(columns) > 1:
        return _with_prompt(values, columns[1:], _contents(values, columns[1:]))
    cell = values.get(columns[0])
    if not is_conversation(cell):
        raise DataError(f"column {columns[0]}: expected a list of messages, found {described(cell)}")
    _refuse_tools(values)
    return _last_reply(columns[0], cell)


def _parsed_pair(values: Mapping[str, Any], columns: Sequence[str]) -> Parsed:
    """Return a pair of preferences. A prompt that is not given is the common beginning of both sides."""
    contents, prompt = _contents(values, columns), values.get("prompt")
    chats = [content for content in contents if not isinstance(content, str)]
    if len(chats) == len(contents) and not is_conversation(prompt) and not _are_replies(contents):
        _refuse_tools(values)
        return _with_common_prompt(chats, columns)
    if prompt is None:
        if chats:
            raise DataError(f"{_PAIR}: {_COMMON}")
        texts = tuple(content for content in contents if isinstance(content, str))
        return _Texts(None, texts, (_PAIR, *_places(columns)))
    return _with_prompt(values, columns, contents)


def _with_common_prompt(sides: Sequence[Conversation], columns: Sequence[str]) -> _Chat:
    for place, side in zip(_places(columns), sides, strict=True):
        with _at(place):
            check_reply(side[-1:])
    chosen, rejected = sides
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise DataError(f"{_PAIR}: {_COMMON}")
    return _checked(_Chat(chosen[:shared], (chosen[shared:], rejected[shared:]), (_PAIR, *_places(columns))))


def _with_prompt(values: Mapping[str, Any], columns: Sequence[str], contents: Sequence[str | Conversation]) -> Parsed:
    """Return the prompt of a row and its completions, each given as text or as messages."""
    prompt, places = values.get("prompt"), ("column prompt", *_places(columns))
    if is_conversation(prompt):
        _refuse_tools(values)
        with _at(places[0]):
            messages = conversation(prompt)
    else:
        texts = tuple(content for content in contents if isinstance(content, str))
        if len(texts) == len(contents):
            return _Texts(_text("prompt", prompt), texts, places)
        _refuse_tools(values)
        if len(contents) == 1 and not _are_replies(contents):  # the completion repeats the prompt, as messages
            return _last_reply(columns[0], values[columns[0]])
        messages = (Message(role="user", content=_text("prompt", prompt)),)
    replies = tuple(
        (Message(role="assistant", content=content),) if isinstance(content, str) else content for content in contents
    )
    size = len(messages)  # some data sets repeat the prompt in the completion
    replies = tuple(reply[size:] if reply[:size] == messages else reply for reply in replies)
    return _checked(_Chat(messages, replies, places))


def _last_reply(name: str, cell: Sequence[Mapping[str, Any]]) -> _Chat:
    with _at(f"column {name}"):
        prompt, reply = split_reply(conversation(cell))
    return _Chat(prompt, (reply,), (f"column {name}",) * 2)


def _checked(chat: _Chat) -> _Chat:
    with _at(chat.places[0]):
        check_prompt(chat.prompt)
    for place, reply in zip(chat.places[1:], chat.replies, strict=True):
        with _at(place):
            check_reply(reply)
    return chat


def _contents(values: Mapping[str, Any], columns: Sequence[str]) -> list[str | Conversation]:
    """Return the text or the messages of each column."""
    contents: list[str | Conversation] = []
    for name in columns:
        cell = values.get(name)
        with _at(f"column {name}"):
            contents.append(conversation(cell) if is_conversation(cell) else _plain(cell))
    return contents


def _places(columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"column {name}" for name in columns)


def _are_replies(contents: Sequence[str | Conversation]) -> bool:
    """Return whether all contents are text, or messages that begin with a turn of the assistant."""
    return all(isinstance(content, str) or content[0].role == "assistant" for content in contents)


def _text(name: str, value: Any) -> str:
    with _at(f"column {name}"):
        return _plain(value)


def _plain(value: Any, expected: str = "text or messages") -> str:
    if not isinstance(value, str) or not is_unicode(value):
        raise DataError(f"expected {expected}, found {described(value)}")
    if not value.strip():
        raise DataError(f"expected text, found {value[:40]!r}")
    return value


def _refuse_tools(values: Mapping[str, Any]) -> None:
    if values.get("tools"):
        raise DataError("column tools: expected none, found tools, which are not read")


def _label(values: Mapping[str, Any]) -> bool | None:
    """Return the label of an unpaired preference. None: there is none, or a text of another meaning.

    Raises:
        DataError: The label is another number, so it does not tell whether the completion is wanted.
    """
    label = values.get("label")
    if label is None:
        return None
    if isinstance(label, str) and label.strip():
        return {"true": True, "false": False, "1": True, "0": False}.get(label.strip().lower())
    if label not in (0, 1):
        raise DataError(f"column label: expected true or false, found {described(label)}")
    return bool(label)


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the columns at fault before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error.message}") from None
