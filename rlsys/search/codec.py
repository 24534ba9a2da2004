"""Thought nodes to and from the tokens of one writer's tokenizer.

A tag may be one added token, or several tokens of a BPE tokenizer whose merges cross its edges: the last token of a
node can then hold the first characters of the next one. Cuts are always made between tokens; `Reading.spill` says
what such a token holds too much.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from rlsys.errors import ConfigError
from rlsys.models.scratch import encode_prompt
from rlsys.types import Int32Array

ReadingDefect = Literal["truncated", "unclosed", "malformed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Where a completion must stop, in the words of an engine."""

    token_ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One piece of a completion: a thought node, or what could not be read as one.

    tag: None where the text does not begin with a known opening tag.
    start, stop: its tokens are [start, stop) of the ids given.
    text: what it says, white space around its tags included.
    spill: text past the closing tag that its last token also holds, "" where that is white space only. It is the
        beginning of the text that follows. A character that the token holds only in part shows as U+FFFD.
    """

    tag: str | None
    start: int
    stop: int
    text: str
    spill: str = ""
    defect: ReadingDefect | None = None


class TagCodec:
    """Encodes, stops and reads chains of nodes for one tokenizer. Pure: the same text gives the same tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tags: names of all tags of the search, without their brackets.
        end_token_ids: tokens that end a completion, the tokenizer's own first.
        digest: `rlsys.models.scratch.tokenizer_digest` of the tokenizer.
        question_template: what the model is asked; {question} is replaced.

    Raises:
        ConfigError: a tag does not come back unchanged from this tokenizer.
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
        self._tag = re.compile("</?(?:" + "|".join(map(re.escape, tags)) + ")>")
        self._anchor: list[int] = []
        self._anchor_text = ""
        # Tags and prefixes come again at every node; encoding them anew took a third of the search's own time.
        self._encoded = lru_cache(maxsize=4096)(self._encode)
        self._check(tags)
        added = tokenizer.get_added_vocab()
        strings = [string for tag in tags for string in (f"<{tag}>", f"</{tag}>")]
        self._tag_tokens = {int(added[text]): text for text in strings if self.encode(text) == [added.get(text)]}

    @property
    def needs_stop_strings(self) -> bool:
        """Whether a tag is no single token, so that its engine must read text to stop there."""
        return len(self._tag_tokens) < 2 * len(self._openings)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text inside a chain; no special tokens are added."""
        return list(self._encoded(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        given = self._anchor_text + text
        return tuple(self._tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"][len(self._anchor) :])

    def decode(self, token_ids: Sequence[int] | Int32Array) -> str:
        """Exact text of tokens inside a chain, special tokens included but for end tokens."""
        kept = self._anchor + [token for token in _integers(token_ids) if token not in self.end_token_ids]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text[len(self._anchor_text) :]

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question, put into the template, ready for the chain."""
        return encode_prompt(self._tokenizer, self._template.replace("{question}", question))

    def stop(self, tag: str) -> Stop:
        """How a completion stops at </tag>: at its token where it is one added token, else at its text."""
        closing = f"</{tag}>"
        tokens = tuple(token for token, text in self._tag_tokens.items() if text == closing)
        return Stop(token_ids=tokens) if tokens else Stop(strings=(closing,))

    def read(self, before: str, token_ids: Sequence[int] | Int32Array, finish_reason: str) -> list[Reading]:
        """Cut the tokens of one call into nodes.

        The spans of the readings partition the tokens. Their texts, joined, are `before` and the text of the tokens,
        up to the spill of the last reading. End tokens at the very end are tokens of the last reading.

        Args:
            before: spill of the token that precedes the first one.
            token_ids: forced and generated tokens. Without any there is nothing to read.
            finish_reason: the engine's; "length" makes a last piece without its closing tag `truncated`.
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
        """Index of the token of every tag in the text, where each is one added token; else empty."""
        places = [place for place, token in enumerate(ids) if token in self._tag_tokens]
        same = len(places) == len(marks) and all(
            self._tag_tokens[ids[place]] == mark.group() for place, mark in zip(places, marks, strict=True)
        )
        return places if same else []

    def _locate(self, before: str, ids: list[int], text: str, cut: int, low: int) -> tuple[int, str]:
        """How many tokens reach character `cut` of the text, at least `low`, and what they say past it."""

        def reached(count: int) -> bool:
            return (before + self.decode(ids[:count]))[:cut] == text[:cut]

        count = bisect_left(range(len(ids)), True, lo=low, key=reached)
        return count, (before + self.decode(ids[:count]))[cut:]

    def _unclosed(self, rest: str, unfinished: ReadingDefect) -> tuple[str | None, ReadingDefect]:
        """Tag and defect of a text that does not begin with a whole node."""
        begun = rest.lstrip()
        marks = self._tag.findall(begun)
        if marks and begun.startswith(marks[0]) and marks[0] in self._openings:
            return marks[0][1:-1], unfinished if len(marks) == 1 else "malformed"
        cut_off = any(opening.startswith(begun) for opening in self._openings)
        return None, unfinished if cut_off else "malformed"

    def _check(self, tags: Sequence[str]) -> None:
        """Find a way to encode and decode inside a chain that keeps every tag.

        Tokenizers in the manner of SentencePiece treat the beginning of a text in a way of their own (a space is put
        before it); behind an end token they do not.
        """
        lost = [self._lost(tag) for tag in tags]
        if not any(lost):
            return
        end = self._tokenizer.convert_ids_to_tokens(self.end_token_id)
        if self._tokenizer(end, add_special_tokens=False)["input_ids"] == [self.end_token_id]:
            self._anchor, self._anchor_text = [self.end_token_id], end
            self._encoded.cache_clear()
            if not any(self._lost(tag) for tag in tags):
                return
        tag, found = next((tag, found) for tag, found in zip(tags, lost, strict=True) if found)
        raise ConfigError(
            f"search.nodes: the tag {tag} is not closable by this tokenizer: expected <{tag}> and </{tag}> to come "
            f"back unchanged from encoding and decoding, {found}; give that node type another tag, or use a model "
            "whose tokenizer keeps this one (model.path, search.model.path, search.reviewer.path)"
        )

    def _lost(self, tag: str) -> str:
        """What becomes of a tag that this tokenizer does not keep, alone or in a chain; "" of one that it does."""
        opening, closing = f"<{tag}>", f"</{tag}>"
        for parts in ((opening,), (closing,), (opening, "a b", closing, opening), (f"{closing}\n{opening} a",)):
            given = "".join(parts)
            found = self.decode([token for part in parts for token in self.encode(part)])
            if found != given:
                return f"found {given!r} as {found!r}"
        return ""


def _closings(text: str, marks: list[re.Match[str]]) -> Iterator[int]:
    """Numbers of the closing tags of the whole nodes that a text begins with."""
    position = 0
    for number in range(1, len(marks), 2):
        opening, closing = marks[number - 1], marks[number]
        if text[position : opening.start()].strip() or closing.group() != f"</{opening.group()[1:]}":
            return
        yield number
        position = closing.end()


def _integers(token_ids: Sequence[int] | Int32Array) -> list[int]:
    return token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)
