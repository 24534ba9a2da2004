"""Cursor over the tokens of a text, with the questions about the next tokens."""

from __future__ import annotations

from itertools import pairwise

from rlsys.tasks.answers.expressions import UnreadableError
from rlsys.tasks.answers.lexer import Token
from rlsys.tasks.answers.units import read_unit

_END = Token("end", "", -1, -1)


class Cursor:
    """Tokens of one text, and the place of the next one."""

    def __init__(self, text: str, tokens: list[Token]) -> None:
        self.text = text
        self.tokens = tokens
        self.place = 0
        self._depth = 0
        self._bars = 0

    @property
    def next(self) -> Token:
        return self.tokens[self.place] if self.place < len(self.tokens) else _END

    def take(self) -> Token:
        token = self.next
        self.place += 1
        return token

    def is_sign(self, *texts: str) -> bool:
        return self.next.kind == "sign" and self.next.text in texts

    def expect(self, text: str) -> None:
        if not self.is_sign(text):
            raise self.unreadable(f"expected {text!r}")
        self.take()

    def unreadable(self, reason: str = "") -> UnreadableError:
        place = self.next.text or "the end"
        return UnreadableError(f"{reason or 'cannot go on'} at {place[:20]!r}")

    def is_per(self) -> bool:
        """Return whether a unit follows a slash, as in "$5/hour"."""
        return self.tokens[self.place + 1].kind == "word"

    def is_times_letter(self) -> bool:
        """Return whether an x stands between a number and a power of ten, as in 1.5 x 10^3."""
        later = self.tokens[self.place + 1 : self.place + 3]
        is_power = [token.text for token in later] == ["10", "^"]
        return self.next.text in ("x", "X") and is_power and self.tokens[self.place - 1].kind == "number"

    def at_modulus(self) -> bool:
        """Return whether "(mod" follows."""
        later = self.tokens[self.place : self.place + 2]
        return [token.text for token in later] == ["(", "mod"]

    def starts_unit(self) -> bool:
        """Return whether letters after a space are a unit, such as m/s in "12 m/s"."""
        token = self.next
        if not token.spaced or token.kind != "symbol" or not self.place:
            return False
        before = self.tokens[self.place - 1]
        numeric = before.kind in ("number", "repeating") or before.text in ("}", ")", "pi")
        return numeric and read_unit(self.rest(), nouns=False) is not None

    def rest(self) -> str:
        """Return the text from the next token to the next separator."""
        stop = len(self.text)
        for before, token in pairwise(self.tokens[self.place - 1 :]):
            if token.kind == "number" and before.text not in ("^", "{", "-"):
                stop = token.start
                break
            if token.text == "-" and before.text in ("^", "{"):
                continue
            if token.kind == "sign" and token.text in (",", ";", "=", "or", "and", ")", "]", r"\}", "≈", "+", "-"):
                stop = token.start
                break
        return self.text[self.next.start : stop] if self.place < len(self.tokens) else ""
