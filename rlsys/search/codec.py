"""Encoding and decoding of thought nodes for one tokenizer.

A tag may be one added token, or several tokens of a BPE tokenizer. The merges of a BPE tokenizer can cross the edges of
a tag, so the last token of a node can hold the first characters of the next node. Nodes are always cut between tokens.
`Reading.spill` holds these extra characters.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from rlsys.errors import ConfigError
from rlsys.models.chat import encode_prompt
from rlsys.tables.messages import with_template
from rlsys.types import Int32Array, Question

ReadingDefect = Literal["truncated", "unclosed", "malformed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Stop tokens and stop strings of a completion, as an engine takes them."""

    token_ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One piece of a completion: a thought node, or text that is not a node.

    Attributes:
        tag: Name of its tag; None if the text does not begin with a known opening tag.
        start, stop: Range [start, stop) of its tokens.
        text: Its text, including white space around the tags.
        spill: Characters of its last token that follow the closing tag; "" if they are only white space. The text of
            the next node begins with them. An incomplete character of the token shows as U+FFFD.
        defect: Reason why the piece is not a whole node; None for a whole node.
    """

    tag: str | None
    start: int
    stop: int
    text: str
    spill: str = ""
    defect: ReadingDefect | None = None


class TagCodec:
    """Encoder and decoder of chains for one tokenizer. The same text always gives the same tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        tags: Names of all tags of the search, without brackets.
        end_token_ids: Tokens that end a completion, the tokenizer's own end token first.
        digest: `rlsys.models.folder.ModelFolder.tokenizer_digest`.
        question_template: Template of the prompt; the question replaces {question}.

    Raises:
        ConfigError: Encoding and decoding with this tokenizer changes a tag.
    """

    def __init__(
        self,
        tokenizer: Any,
        tags: Sequence[str],
        end_token_ids: Sequence[int],
        *,
        digest: str,
        question_template: str = "{question}",
    ) -> None:
        self.digest = digest
        self.end_token_id = int(end_token_ids[0])
        self._tokenizer = tokenizer
        self.end_token_ids = frozenset(int(token) for token in end_token_ids)
        self._template = question_template
        self._openings = tuple(f"<{tag}>" for tag in tags)
        self.tags = tuple(string for tag in tags for string in (f"<{tag}>", f"</{tag}>"))
        self._tag = re.compile("</?(?:" + "|".join(map(re.escape, tags)) + ")>")
        # An end token before every text, if the tokenizer changes the beginning of a text; see `_check`.
        self._anchor: list[int] = []
        self._anchor_text = ""
        # Every node has the same tags and prefixes. Encoding them each time took a third of the search's own time.
        self._encoded = lru_cache(maxsize=4096)(self._encode)
        self._check(tags)
        added = tokenizer.get_added_vocab()
        self._tag_tokens = {int(added[text]): text for text in self.tags if self.encode(text) == [added.get(text)]}

    @property
    def needs_stop_strings(self) -> bool:
        """True if a tag is not a single token, so that the engine must compare text to stop at it."""
        return len(self._tag_tokens) < 2 * len(self._openings)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text inside a chain, without added special tokens."""
        return list(self._encoded(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        given = self._anchor_text + text
        return tuple(self._tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"][len(self._anchor) :])

    def decode(self, token_ids: Sequence[int] | Int32Array) -> str:
        """Return the exact text of tokens inside a chain, with special tokens but without end tokens."""
        ids = self._anchor + [token for token in _integers(token_ids) if token not in self.end_token_ids]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text[len(self._anchor_text) :]

    def prompt(self, question: Question) -> list[int]:
        """Return the token ids of the prompt for a question. The chain follows them directly."""
        return encode_prompt(self._tokenizer, with_template(question, self._template))

    @cached_property
    def stop(self) -> Stop:
        """The stop of the completion of one node: at any tag.

        Its own closing tag makes the node whole, and after any other tag it cannot become whole. A tag that is one
        added token stops by its token, and another one by its text.
        """
        single = set(self._tag_tokens.values())
        strings = tuple(text for text in self.tags if text not in single)
        return Stop(token_ids=tuple(self._tag_tokens), strings=strings)

    def read(self, before: str, token_ids: Sequence[int] | Int32Array, finish_reason: str) -> list[Reading]:
        """Split the tokens of one engine call into nodes.

        Args:
            before: Spill of the token that precedes the first token.
            token_ids: Forced and generated tokens.
            finish_reason: Finish reason of the engine. "length" makes a last piece without closing tag `truncated`.

        Returns:
            The pieces. Their spans partition the tokens. Their joined texts are `before` and the text of the tokens,
            without the spill of the last piece. The last piece includes end tokens at the end.
        """
        ids = _integers(token_ids)
        body = len(ids)
        while body and ids[body - 1] in self.end_token_ids:
            body -= 1
        text = before + self.decode(ids[:body])
        marks = list(self._tag.finditer(text))
        places = self._places(ids, marks)
        readings: list[Reading] = []
        token = position = 0
        for number in _closings(text, marks):
            cut = marks[number].end()
            stop, held = (places[number] + 1, "") if places else self._locate(before, ids[:body], text, cut, token)
            spill = held if held.strip() else ""
            cut += 0 if spill else len(held)
            name = marks[number].group()[2:-1]
            readings.append(Reading(tag=name, start=token, stop=stop, text=text[position:cut], spill=spill))
            token, position = stop, cut
            if stop == body:
                break
        rest = text[position:]
        if token == len(ids):
            return readings
        if readings and not rest.strip():
            last = readings.pop()
            return [*readings, replace(last, stop=len(ids), text=last.text + rest, spill="")]
        tag, defect = self._unclosed(rest, "truncated" if finish_reason == "length" else "unclosed")
        return [*readings, Reading(tag=tag, start=token, stop=len(ids), text=rest, defect=defect)]

    def _places(self, ids: list[int], marks: list[re.Match[str]]) -> list[int]:
        """Return the token index of each tag in the text, or [] if not every tag is one added token."""
        places = [place for place, token in enumerate(ids) if token in self._tag_tokens]
        same = len(places) == len(marks) and all(
            self._tag_tokens[ids[place]] == mark.group() for place, mark in zip(places, marks, strict=True)
        )
        return places if same else []

    def _locate(self, before: str, ids: list[int], text: str, cut: int, low: int) -> tuple[int, str]:
        """Return how many tokens cover the first `cut` characters (at least `low`), and their text after these."""

        def reached(count: int) -> bool:
            return (before + self.decode(ids[:count]))[:cut] == text[:cut]

        count = bisect_left(range(len(ids)), True, lo=low, key=reached)
        return count, (before + self.decode(ids[:count]))[cut:]

    def _unclosed(self, rest: str, unfinished: ReadingDefect) -> tuple[str | None, ReadingDefect]:
        """Return the tag and the defect of a text that does not begin with a whole node."""
        begun = rest.lstrip()
        marks = self._tag.findall(begun)
        if marks and begun.startswith(marks[0]) and marks[0] in self._openings:
            return marks[0][1:-1], unfinished if len(marks) == 1 else "malformed"
        cut_off = any(opening.startswith(begun) for opening in self._openings)
        return None, unfinished if cut_off else "malformed"

    def _check(self, tags: Sequence[str]) -> None:
        """Find a way to encode and decode that keeps every tag, or raise ConfigError.

        A tokenizer like SentencePiece puts a space before the beginning of a text, but not after an end token.
        Every text is then encoded and decoded behind an end token.
        """
        changes = [self._change(tag) for tag in tags]
        if not any(changes):
            return
        end = self._tokenizer.convert_ids_to_tokens(self.end_token_id)
        if self._tokenizer(end, add_special_tokens=False)["input_ids"] == [self.end_token_id]:
            self._anchor, self._anchor_text = [self.end_token_id], end
            self._encoded.cache_clear()
            if not any(self._change(tag) for tag in tags):
                return
        tag, change = next((tag, change) for tag, change in zip(tags, changes, strict=True) if change)
        raise ConfigError(
            f"search.nodes: the tag {tag} is changed by this tokenizer: expected <{tag}> and </{tag}> to come "
            f"back unchanged from encoding and decoding, {change}; give that node type another tag, or use a model "
            "whose tokenizer keeps this one (model.path, search.model.path, search.reviewer.path)"
        )

    def _change(self, tag: str) -> str:
        """Return how encoding and decoding changes a tag, alone or in a chain; "" if it does not."""
        opening, closing = f"<{tag}>", f"</{tag}>"
        for parts in ((opening,), (closing,), (opening, "a b", closing, opening), (f"{closing}\n{opening} a",)):
            given = "".join(parts)
            decoded = self.decode([token for part in parts for token in self.encode(part)])
            if decoded != given:
                return f"found {given!r} as {decoded!r}"
        return ""


def _closings(text: str, marks: list[re.Match[str]]) -> Iterator[int]:
    """Yield the index in `marks` of each closing tag, for the whole nodes at the start of a text."""
    position = 0
    for number in range(1, len(marks), 2):
        opening, closing = marks[number - 1], marks[number]
        if text[position : opening.start()].strip() or closing.group() != f"</{opening.group()[1:]}":
            return
        yield number
        position = closing.end()


def _integers(token_ids: Sequence[int] | Int32Array) -> list[int]:
    return token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)
