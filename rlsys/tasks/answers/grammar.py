"""Grammar of expressions: sums, products and powers. A text that is not used whole is unreadable."""

from __future__ import annotations

import re

from rlsys.tasks.answers.atoms import Atoms
from rlsys.tasks.answers.expressions import Expr, UnreadableError, apply, number
from rlsys.tasks.answers.number_words import SCALES
from rlsys.tasks.answers.units import read_unit

MAX_DEPTH = 40


class Grammar(Atoms):
    """Recursive descent over the tokens of one text."""

    def expression(self) -> Expr:
        """Read a sum."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError(f"more than {MAX_DEPTH} levels")
        value = self._signed_term()
        while self.is_sign("+", "-", "±", "∓"):
            sign = self.take().text
            term = self._term()
            op = {"±": "plus_minus", "∓": "minus_plus"}.get(sign)
            value = (
                apply(op, value, term) if op else apply("add", value, term if sign == "+" else apply("negate", term))
            )
        if self.next.kind == "command" and self.next.text in ("over", "choose"):
            value = apply("divide" if self.take().text == "over" else "binomial", value, self.expression())
        self._depth -= 1
        return value

    def _signed_term(self) -> Expr:
        if not self.is_sign("+", "-", "±", "∓"):
            return self._term()
        sign = self.take().text
        term = self._signed_term()
        if sign in "±∓":
            return apply("plus_minus" if sign == "±" else "minus_plus", number(0), term)
        return apply("negate", term) if sign == "-" else term

    def _term(self) -> Expr:
        """Read a product, with or without signs, from left to right."""
        value = self.factor()
        while True:
            if self.is_sign("/") and self.tokens[self.place + 1 : self.place + 2][:1] and self.is_per():
                return value
            if self.is_sign("*", "/"):
                sign = self.take().text
                factor = self._signed_factor()
                value = apply("multiply" if sign == "*" else "divide", value, factor)
            elif self.is_times_letter():
                self.take()
                value = apply("multiply", value, self.factor())
            elif self._starts_factor(value):
                value = apply("multiply", value, self.factor())
            else:
                return value

    def _signed_factor(self) -> Expr:
        if self.is_sign("-", "+"):
            return apply("negate", self._signed_factor()) if self.take().text == "-" else self._signed_factor()
        return self.factor()

    def _starts_factor(self, before: Expr) -> bool:
        """Return whether a factor without a sign before it follows. Two numbers side by side are not a product."""
        token = self.next
        if token.kind == "symbol":
            return not self.starts_unit()
        if token.kind == "command" and token.text == "frac" and token.spaced and read_unit(self.rest(), nouns=False):
            return False
        if token.kind == "command":
            return token.text in ("frac", "sqrt", "binom", "pi", "infty")
        if token.kind == "function":
            return True
        if self.at_modulus():
            return False
        if token.kind == "number":  # 3!7!
            return before.op == "factorial"
        return self.is_sign("(", "⌊", "⌈", "{") or (self.is_sign("|") and not self._bars)

    def factor(self) -> Expr:
        """Read a base with its exponent and the signs after it."""
        base = self.postfix(self.base())
        if self.is_sign("^"):
            self.take()
            base = self.postfix(apply("power", base, self.exponent()))
        return base

    def postfix(self, value: Expr) -> Expr:
        """Read factorials, percent, degrees and words such as "million" behind a value."""
        while self.is_sign("!", "%", "°") or self.next.kind == "word":
            if self.next.kind == "word":
                factor = SCALES.get(self.next.text.lower())
                if self.next.text.lower() != "percent" and factor is None:
                    return value
                self.take()
                value = apply("percent", value) if factor is None else apply("multiply", value, number(factor))
                continue
            if self.is_sign("°") and re.match(r"\s*(?:[CF]\b|celsius|fahrenheit)", self.text[self.next.end :], re.I):
                return value
            sign = self.take().text
            if sign == "!" and self.is_sign("!") and not self.next.spaced:
                self.take()
                sign = "!!"
            value = apply({"!": "factorial", "!!": "double_factorial", "%": "percent", "°": "degree"}[sign], value)
        return value

    def exponent(self) -> Expr:
        if self.is_sign("{"):
            return self.group()
        if self.is_sign("-", "+"):
            return apply("negate", self.exponent()) if self.take().text == "-" else self.exponent()
        base = self.base()
        if self.is_sign("^"):  # 9^9^9 is 9^(9^9)
            self.take()
            base = apply("power", base, self.exponent())
        return self.postfix(base) if self.is_sign("!") else base
