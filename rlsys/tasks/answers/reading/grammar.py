"""Grammar of expressions, from numbers to sums. A text that is not used whole is unreadable."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from rlsys.tasks.answers.reading.lexer import Token, read_decimal, read_repeating
from rlsys.tasks.answers.reading.number_words import SCALES
from rlsys.tasks.answers.reading.operators import OPERATOR_COMMANDS, read_operator
from rlsys.tasks.answers.reading.units import read_unit
from rlsys.tasks.answers.values import Expr, UnreadableError, apply, names_of, number, symbol

MAX_DEPTH = 40

_END = Token("end", "", -1, -1)
# The reader of lists replaces plus-minus signs by one sign each.
_SIGNS = ("+", "-", "±", "∓")
_SEPARATORS = frozenset({*names_of(r", ; : = ≠ < > ≤ ≥ ≈ ≡ ∈ ∪ ∩ ∖ ⟩ | ) ] \} + - mod"), "and", "or"})
_POSTFIX = {"!": "factorial", "!!": "double_factorial", "%": "percent", "°": "degree"}
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_LIST_FUNCTIONS = frozenset({"gcd", "lcm", "max", "min"})
_PLAIN_FRACTION = re.compile(r"\\frac\s*(?:\d|\{\s*\d+\s*\})\s*(?:\d|\{\s*\d+\s*\})")
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", "⌊": "⌋", "⌈": "⌉", "|": "|"}
_ENCLOSED = {"|": "abs", "⌊": "floor", "⌈": "ceil"}


class Cursor:
    """Tokens of one text, the place of the next one, and questions about it."""

    def __init__(self, text: str, tokens: list[Token]) -> None:
        self.text = text
        self.tokens = tokens
        self.place = 0

    @property
    def next(self) -> Token:
        return self.later(0)

    def later(self, distance: int = 1) -> Token:
        place = self.place + distance
        return self.tokens[place] if place < len(self.tokens) else _END

    def take(self) -> Token:
        token = self.next
        self.place += 1
        return token

    def is_sign(self, *texts: str) -> bool:
        return self.next.kind == "sign" and self.next.text in texts

    def takes(self, *texts: str) -> bool:
        """Take the next token if it is one of some signs, and return whether it is."""
        is_next = self.is_sign(*texts)
        self.place += is_next
        return is_next

    def expect(self, text: str) -> None:
        if not self.takes(text):
            raise self.unreadable(f"expected {text!r}")

    def unreadable(self, reason: str = "") -> UnreadableError:
        place = self.next.text or "the end"
        return UnreadableError(f"{reason or 'cannot go on'} at {place[:20]!r}")

    def at_modulus(self) -> bool:
        """Return whether "(mod" follows."""
        return (self.next.text, self.later().text) == ("(", "mod")

    def starts_unit(self) -> bool:
        """Return whether a unit with a word follows, such as m/sec. Letters alone may be variables."""
        words = (token.kind == "word" for token in self.tokens[self.place : self.unit_end()])
        is_place = self.next.text == "frac" or self.may_be_unit()
        return is_place and any(words) and read_unit(self.rest(), nouns=False) is not None

    def may_be_unit(self) -> bool:
        """Return whether a space stands between a number and a symbol or fraction."""
        token = self.next
        if not token.spaced or not self.place or not (token.kind == "symbol" or token.text == "frac"):
            return False
        before = self.tokens[self.place - 1]
        return before.kind in ("number", "repeating") or before.text in ("}", ")", "pi")

    def rest(self) -> str:
        """Return the text from the next token to the next separator."""
        return self.text[self.next.start : self.tokens[self.unit_end() - 1].end] if self.unit_end() > self.place else ""

    def unit_end(self) -> int:
        """Return the place after the tokens of a unit: a number after a word, a separator, or the end."""
        depth = 0
        for place in range(self.place, len(self.tokens)):
            token, before = self.tokens[place], self.tokens[place - 1].text
            in_power = before in ("^", "{")
            if token.kind == "number" and not in_power and before != "-":
                return place
            if token.kind == "sign":
                depth += (token.text == "{") - (token.text == "}")
                if depth < 0 or (token.text in _SEPARATORS and not (token.text == "-" and in_power)):
                    return place
        return len(self.tokens)


class Grammar(Cursor):
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str, tokens: list[Token]) -> None:
        super().__init__(text, tokens)
        self._depth = 0
        self._bars = 0
        self.differential = -1  # the place of dx, after which the variable is known

    def expression(self) -> Expr:
        """Read a sum."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError(f"more than {MAX_DEPTH} levels")
        value = self.signed(self.term, *_SIGNS)
        while self.is_sign(*_SIGNS):
            is_minus = self.take().text == "-"
            value = apply("add", value, apply("negate", self.term()) if is_minus else self.term())
        if self.next.kind == "command" and self.next.text in ("over", "choose"):
            value = apply("divide" if self.take().text == "over" else "binomial", value, self.expression())
        self._depth -= 1
        return value

    def signed(self, read: Callable[[], Expr], *signs: str) -> Expr:
        """Read what may have signs before it."""
        if not self.is_sign(*signs):
            return read()
        is_minus = self.take().text == "-"
        value = self.signed(read, *signs)
        return apply("negate", value) if is_minus else value

    def term(self) -> Expr:
        """Read a product, with or without signs, from left to right."""
        value = self.factor()
        while True:
            is_per = self.is_sign("/") and self.later().kind == "word"  # a unit follows, as in "$5/hour"
            if self.is_sign("*", "/") and not is_per:
                op = "multiply" if self.take().text == "*" else "divide"
                factor = self.signed(self.factor, "+", "-")
                if op == "divide" and factor.op == "percent" and (value.op, factor.args[0].op) == ("number", "number"):
                    value = apply("percent", apply(op, value, *factor.args))  # 1/2% is half a percent
                else:
                    value = apply(op, value, factor)
            elif self._is_times_letter() or self._starts_factor(value):
                self.place += self._is_times_letter()
                value = apply("multiply", value, self.factor())
            else:
                return value

    def _is_times_letter(self) -> bool:
        """Return whether an x stands between a number and a power of ten, as in 1.5 x 10^3."""
        is_power = (self.later(1).text, self.later(2).text) == ("10", "^")
        return self.next.text in ("x", "X") and is_power and self.tokens[self.place - 1].kind == "number"

    def _starts_factor(self, before: Expr) -> bool:
        """Return whether a factor without a sign before it follows. Two numbers side by side are not a product."""
        token = self.next
        if token.kind == "symbol":
            return not self.starts_unit()
        if token.kind == "command":
            is_factor = token.text in ("frac", "sqrt", "binom", "pi", "infty", *OPERATOR_COMMANDS)
            return is_factor and not self.starts_unit()
        if token.kind == "number":  # 3!7!
            return before.op == "factorial"
        is_open = self.is_sign("(", "⌊", "⌈", "{") or (self.is_sign("|") and not self._bars)
        return token.kind == "function" or (is_open and not self.at_modulus())

    def factor(self) -> Expr:
        """Read a base with its exponent and the signs after it."""
        base = self._postfix(self._base())
        return self._postfix(apply("power", base, self._exponent())) if self.takes("^") else base

    def _postfix(self, value: Expr) -> Expr:
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
            if sign == "!" and not self.next.spaced and self.takes("!"):
                sign = "!!"
            value = apply(_POSTFIX[sign], value)
        return value

    def _exponent(self) -> Expr:
        return self.group() if self.is_sign("{") else self.signed(self._unsigned_exponent, "+", "-")

    def _unsigned_exponent(self) -> Expr:
        if self.is_sign("{"):
            return self.group()
        base = self._base()
        if self.takes("^"):  # 9^9^9 is 9^(9^9)
            base = apply("power", base, self._exponent())
        return self._postfix(base) if self.is_sign("!") else base

    def _base(self) -> Expr:
        spaced = self.may_be_unit()
        base = self._unspaced_base()
        return replace(base, spaced=True) if spaced else base

    def _unspaced_base(self) -> Expr:
        if self.place == self.differential:
            self.place += 2
            return number(1)
        token = self.take()
        match token.kind:
            case "number":
                return self._number(token)
            case "repeating":
                return number(read_repeating(token.text))
            case "symbol":
                return self._symbol(token.text)
            case "function":
                return self._function(_ALIASES.get(token.text, token.text))
            case "command" if token.text in ("pi", "infty"):
                return apply("pi" if token.text == "pi" else "infinity")
            case "command" if token.text in ("frac", "binom"):
                above = self.group()
                return apply("divide" if token.text == "frac" else "binomial", above, self.group())
            case "command" if token.text in OPERATOR_COMMANDS:
                return read_operator(self, OPERATOR_COMMANDS[token.text])
            case "sign" if token.text in _CLOSING and token.text != r"\{":
                return self.enclosed(token.text)
        self.place -= 1
        raise self.unreadable()

    def enclosed(self, opening: str) -> Expr:
        """Read an expression after a bracket or bar, up to its partner."""
        bars, self._bars = self._bars, self._bars + 1 if opening == "|" else 0
        value = self.expression()
        self.expect(_CLOSING[opening])
        self._bars = bars
        return apply(_ENCLOSED[opening], value) if opening in _ENCLOSED else value

    def group(self) -> Expr:
        """Read the argument of a LaTeX command: braces, or one character."""
        if self.takes("{"):
            return self.enclosed("{")
        token = self.next
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():  # \frac12: one digit each
            self.tokens[self.place] = Token("number", token.text[1:], token.start + 1, token.end)
            return number(int(token.text[0]))
        if token.kind in ("number", "symbol", "command"):
            return self._base()
        raise self.unreadable("expected an argument")

    def _number(self, token: Token) -> Expr:
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

    def _symbol(self, name: str) -> Expr:
        if self.takes("_"):
            name += "_" + self._index()
        while self.takes("'"):
            name += "'"
        if name in ("f", "g") and not self.next.spaced and self.takes("("):
            return Expr(op="unknown", args=(self.enclosed("("),), name=name)
        return apply(name) if name in ("e", "i") else symbol(name)

    def _index(self) -> str:
        if not self.takes("{"):
            return self.take().text
        text = ""
        while not self.takes("}"):
            if self.next.kind == "end":
                raise self.unreadable("expected '}'")
            text += self.take().text
        return text

    def _root(self, degree: Expr) -> Expr:
        """Read the argument of a root. Without braces, it is a whole number: √12 has two digits."""
        if self.takes("["):
            degree = self.enclosed("[")
        if self.takes("("):
            return apply("root", self.enclosed("("), degree)
        return apply("root", self._number(self.take()) if self.next.kind == "number" else self.group(), degree)

    def _function(self, name: str) -> Expr:
        if name in ("sqrt", "cbrt"):
            return self._root(number(2 if name == "sqrt" else 3))
        base = self.group() if name == "log" and self.takes("_") else None
        exponent = self._exponent() if self.takes("^") else None
        if exponent == apply("negate", number(1)):
            if name not in ("sin", "cos", "tan", "cot", "sec", "csc"):
                raise self.unreadable(f"{name}^-1 has two meanings")
            name, exponent = f"arc{name}", None
        arguments = self._list_arguments() if name in _LIST_FUNCTIONS else (self._argument(),)
        if name == "exp":
            value = apply("power", apply("e"), *arguments)
        else:
            value = apply(name, *arguments, base) if base else apply(name, *arguments)
        return apply("power", value, exponent) if exponent else value

    def _list_arguments(self) -> tuple[Expr, ...]:
        opening = self.take().text
        if opening not in ("(", r"\{"):
            raise self.unreadable("expected a bracket")
        values = [self.expression()]
        while self.takes(","):
            values.append(self.expression())
        self.expect(_CLOSING[opening])
        return tuple(values)

    def _argument(self) -> Expr:
        """Read the argument of a function. Without brackets, it reaches to the next sign or function.

        sin(x)^2 has two meanings; both sides are read in the same way.
        """
        if self.takes("("):
            return self.enclosed("(")
        value = self._postfix(self.signed(self._base, "-"))
        if self.tokens[self.place - 1].text != ")" and self.takes("^"):
            value = apply("power", value, self._exponent())
        while self.next.kind in ("symbol", "command") and self.next.text != "infty" and not self.starts_unit():
            value = apply("multiply", value, self.factor())
        if self.is_sign("/") and value.op != "number":
            raise self.unreadable("a function without brackets before '/' has two meanings")
        return value
