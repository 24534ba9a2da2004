"""Atoms of expressions: numbers, symbols, fractions, roots, functions and brackets."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from fractions import Fraction

from rlsys.tasks.answers.cursor import Cursor
from rlsys.tasks.answers.expressions import Based, Expr, UnreadableError, apply, number, symbol
from rlsys.tasks.answers.lexer import Token

MAX_DIGITS = 5000
# Characters of a number before ten to a power is kept as an operation.
MAX_EXPONENT = 5000

_ARC = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc"}
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_LIST_FUNCTIONS = frozenset({"gcd", "lcm", "max", "min"})
_PLAIN_FRACTION = re.compile(r"\\frac\s*(?:\d|\{\s*\d+\s*\})\s*(?:\d|\{\s*\d+\s*\})")
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", "⌊": "⌋", "⌈": "⌉", "|": "|"}


class Atoms(Cursor, ABC):
    """Reader of the smallest parts of an expression. The parts may contain whole expressions."""

    @abstractmethod
    def expression(self) -> Expr:
        """Read a sum."""

    @abstractmethod
    def factor(self) -> Expr:
        """Read a base with its exponent and the signs after it."""

    @abstractmethod
    def exponent(self) -> Expr:
        """Read what stands after "^"."""

    @abstractmethod
    def postfix(self, value: Expr) -> Expr:
        """Read factorials, percent, degrees and words such as "million" behind a value."""

    def base(self) -> Expr:
        token = self.take()
        match token.kind:
            case "number":
                return self._number(token)
            case "repeating":
                return number(read_repeating(token.text))
            case "symbol":
                return self._symbol(token)
            case "function":
                return self._function(token.text)
            case "command":
                return self._command(token.text)
            case "sign" if token.text in _CLOSING and token.text != r"\{":
                return self._enclosed(token.text)
        self.place -= 1
        raise self.unreadable()

    def _enclosed(self, opening: str) -> Expr:
        self._bars += opening == "|"
        if opening != "|":
            bars, self._bars = self._bars, 0
        value = self.expression()
        self.expect(_CLOSING[opening])
        if opening == "|":
            self._bars -= 1
        else:
            self._bars = bars
        name = {"|": "abs", "⌊": "floor", "⌈": "ceil"}.get(opening)
        return apply(name, value) if name else value

    def group(self) -> Expr:
        """Read the argument of a LaTeX command: braces, or one character."""
        if self.is_sign("{"):
            self.take()
            return self._enclosed("{")
        token = self.next
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():  # \frac12: one digit each
            self.tokens[self.place] = Token("number", token.text[1:], token.start + 1, token.end)
            return number(int(token.text[0]))
        if token.kind in ("number", "symbol", "command"):
            return self.base()
        raise self.unreadable("expected an argument")

    def _number(self, token: Token) -> Expr:
        if len(token.text) > MAX_DIGITS:
            raise UnreadableError(f"a number with more than {MAX_DIGITS} digits")
        value = read_decimal(token.text)
        # 1\frac{1}{2} is the sum 3/2; a fraction with other content is a factor or a unit.
        is_fraction = self.next.kind == "command" and _PLAIN_FRACTION.match(self.text, self.next.start)
        if token.text.isdigit() and is_fraction:
            self.take()
            above, below = self.group().value, self.group().value
            if not 0 < above < below:
                raise UnreadableError("a mixed number needs a proper fraction")
            return number(value.value + above / below)
        return value

    def _symbol(self, token: Token) -> Expr:
        name = token.text
        if self.is_sign("_"):
            self.take()
            name += "_" + self._index()
        while self.is_sign("'"):
            self.take()
            name += "'"
        if name in ("f", "g") and self.is_sign("(") and not self.next.spaced:
            self.take()
            return Expr(op="unknown", args=(self._enclosed("("),), name=name)
        return apply(name) if name in ("e", "i") else symbol(name)

    def _index(self) -> str:
        if not self.is_sign("{"):
            return self.take().text
        start = self.place
        self.take()
        while not self.is_sign("}"):
            if self.next.kind == "end":
                raise self.unreadable("expected '}'")
            self.take()
        self.take()
        return "".join(token.text for token in self.tokens[start + 1 : self.place - 1])

    def _command(self, name: str) -> Expr:
        match name:
            case "pi":
                return apply("pi")
            case "infty":
                return apply("infinity")
            case "frac" | "binom":
                above = self.group()
                return apply("divide" if name == "frac" else "binomial", above, self.group())
        self.place -= 1
        raise self.unreadable()

    def _root(self, degree: Expr) -> Expr:
        """Read the argument of a root. Without braces, it is a whole number: √12 has two digits."""
        if self.is_sign("["):
            self.take()
            degree = self._enclosed("[")
        if self.is_sign("("):
            self.take()
            return apply("root", self._enclosed("("), degree)
        if self.next.kind == "number":
            return apply("root", self._number(self.take()), degree)
        return apply("root", self.group(), degree)

    def _function(self, name: str) -> Expr:
        name = _ALIASES.get(name, name)
        if name in ("sqrt", "cbrt"):
            return self._root(number(2 if name == "sqrt" else 3))
        base: Expr | None = None
        if self.is_sign("_") and name == "log":
            self.take()
            base = self.group()
        exponent: Expr | None = None
        if self.is_sign("^"):
            self.take()
            exponent = self.exponent()
            if exponent == apply("negate", number(1)):
                if name not in _ARC:
                    raise self.unreadable(f"{name}^-1 has two meanings")
                name, exponent = _ARC[name], None
        arguments = self._arguments(name)
        if name == "exp":
            value = apply("power", apply("e"), *arguments)
        else:
            value = apply("log", *arguments, base) if base else apply(name, *arguments)
        return apply("power", value, exponent) if exponent else value

    def _arguments(self, name: str) -> tuple[Expr, ...]:
        """Read the arguments of a function. Without brackets, they reach to the next sign or function."""
        if name in _LIST_FUNCTIONS:
            opening = self.take().text
            if opening not in ("(", r"\{"):
                raise self.unreadable("expected a bracket")
            values = [self.expression()]
            while self.is_sign(","):
                self.take()
                values.append(self.expression())
            self.expect(_CLOSING[opening])
            return tuple(values)
        if self.is_sign("("):
            self.take()
            value = self._enclosed("(")
            return (self._powered(value),)
        value = self._powered(self.postfix(self._signed_base()))
        while self.next.kind in ("symbol", "number") or (self.next.kind == "command" and self.next.text != "infty"):
            if self.next.kind == "number" or self.starts_unit():
                break
            value = apply("multiply", value, self.factor())
        if self.is_sign("/") and value.op != "number":
            raise self.unreadable("a function without brackets before '/' has two meanings")
        return (value,)

    def _signed_base(self) -> Expr:
        if self.is_sign("-"):
            self.take()
            return apply("negate", self.base())
        return self.base()

    def _powered(self, value: Expr) -> Expr:
        if not self.is_sign("^"):
            return value
        if self.tokens[self.place - 1].text == ")":  # sin(x)^2 has two meanings; both sides are read in the same way
            return value
        self.take()
        return apply("power", value, self.exponent())


def read_decimal(text: str) -> Expr:
    """Return a number with the unit of its last digit; a large power of ten stays an operation."""
    mantissa, _, exponent = text.lower().partition("e")
    digits = mantissa.partition(".")[2]
    power = int(exponent or 0)
    if abs(power) > MAX_EXPONENT:
        return apply("multiply", number(Fraction(mantissa)), apply("power", number(10), number(power)))
    is_exact = "." not in mantissa and not exponent
    step = None if is_exact else Fraction(10) ** (power - len(digits))
    return number(Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** power, step)


def read_based(text: str) -> Based:
    """Return the digits and the base of a text such as 2516_8."""
    digits, _, base = text.partition("_")
    if not 2 <= int(base) <= 36 or any(int(digit, 36) >= int(base) for digit in digits):
        raise UnreadableError(f"{text[:20]!r} has digits outside its base")
    return Based(digits.lstrip("0") or "0", int(base))


def read_repeating(text: str) -> Fraction:
    r"""Return the value of 0.1\overline{6} or 0.1(6)."""
    whole, fixed, repeated = re.match(r"(\d*)\.(\d*)[^\d]+(\d+)", text).groups()  # type: ignore[union-attr]
    size = 10 ** len(fixed)
    return Fraction(int(f"{whole}{fixed}" or 0), size) + Fraction(int(repeated), size * (10 ** len(repeated) - 1))
