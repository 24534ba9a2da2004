"""Reader of answers: from a normalised text to a value, or the reason why it is unreadable."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product

from rlsys.tasks.answers.normalise import normalise
from rlsys.tasks.answers.reading.grammar import Grammar
from rlsys.tasks.answers.reading.letters import amount_of
from rlsys.tasks.answers.reading.lexer import Token, join_numbers, read_based, tokens_of
from rlsys.tasks.answers.reading.notations import read_marks, rephrased, standard_notation
from rlsys.tasks.answers.reading.number_words import CARDINALS
from rlsys.tasks.answers.reading.units import CURRENCIES, NO_NOUNS, read_unit
from rlsys.tasks.answers.reading.words import read_any_words, read_words
from rlsys.tasks.answers.values import (
    REAL_LINE,
    Congruence,
    Expr,
    Matrix,
    Quantity,
    Ratio,
    Relation,
    Sequence,
    Union,
    Unit,
    UnreadableError,
    Value,
    Words,
    apply,
    formula_of,
    names_of,
    number,
    symbol,
)

MAX_ANSWER_CHARS = 1024
# Readings of statements with plus-minus signs.
MAX_READINGS = 64

_RELATIONS = ("=", "≠", "<", ">", "≤", "≥", "≈", "∈")
_SETS = {"∪": "union", "∩": "intersection", "∖": "minus"}
_PAIRS = {"(": ")]", "[": ")]", "⟨": "⟩", r"\{": (r"\}",), "{": "}"}
_CURRENCY = re.compile(r"\$\s?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?!\s*\$)(?=\Z|[\s,;)/]|-)")
_SEPARATOR = r"\s*(?::|\bto\b)\s*"
_BASE = re.compile(
    r"\(?\s*(?P<digits>[0-9A-Fa-f]+)\s*\)?\s*"
    r"(?:\(?\s*(?:in\s+)?base[\s-]+(?P<named>\w+)\s*\)?|_\s*(?P<open>\{)?\s*\(?\s*(?P<index>\w+)\s*\)?\s*(?(open)\}))"
    r"|0(?P<letter>[box])(?P<rest>[0-9A-Fa-f]+)",
    re.ASCII,
)
_PREFIX_BASES = {"b": "2", "o": "8", "x": "16"}
# Words that are no noun after a number, but may be a label.
_LABEL_WORDS = frozenset(names_of("sum maximum minimum score root roots base power"))
# What an equation may have on its left besides a symbol: a quantity of geometry, a value of a function, or words.
_LABEL = re.compile(
    r"((?:m\s*)?\\(?:angle|triangle)\s*[A-Z]{1,4}|\|?[A-Z]{2,4}\|?|\[[A-Z]{3,5}\]|[CEP]\s*\([^()]*\)"
    r"|[f-hp-rt-wA-Z](?:_\w|'{1,3}|\^\s*\{?\s*-1\s*\}?)?\s*\(\s*-?\w+\s*\)|\\frac\s*\{\s*d\w?\s*\}\s*\{\s*d\w\s*\}"
    r"|[a-zA-Z](?=\s+is\b)|(?:[Tt]he )?(?P<words>[A-Za-z][a-z]{2,}(?: [A-Za-z]+){0,4}))"
    r"\s*(?:=(?!=)|\bis\b|(?(words):|(?!)))\s*(?=\S)"
)


@lru_cache(maxsize=2048)
def read_answer(text: str) -> Value:
    """Return the value of a text that consists of an answer only.

    Raises:
        UnreadableError: the text, used whole, has none of the known forms.
    """
    if len(text) > MAX_ANSWER_CHARS:
        raise UnreadableError(f"more than {MAX_ANSWER_CHARS} characters")
    plain = rephrased(normalise(text))
    if not plain:
        raise UnreadableError("an empty text")
    return _read_labelled(plain) or _read_value(plain)


def _read_value(plain: str) -> Value:
    value = read_words(plain) or read_marks(plain) or _read_ratio(plain)
    if value is not None:
        return value
    try:
        return _read_mathematics(plain)
    except UnreadableError:
        words = read_any_words(plain)
        if words is None:
            raise
        return words


def _read_labelled(plain: str) -> Relation | None:
    """Read an equation with more than a symbol on its left, such as "Area = 5"."""
    match = _LABEL.match(plain)
    if match is None or not (NO_NOUNS - _LABEL_WORDS).isdisjoint((match["words"] or "").lower().split()):
        return None
    try:
        rest = rephrased(plain[match.end() :])
        value = _read_labelled(rest) or _read_value(rest)
    except UnreadableError:
        return None
    text = re.sub(r"\s", "", match[1])
    name = symbol("y" if text == "f(x)" else text)
    if isinstance(value, Relation):
        return Relation((name, *value.sides), ("=", *value.signs))
    is_list = isinstance(value, Sequence) and not value.brackets and any(isinstance(x, Relation) for x in value.items)
    return None if is_list or isinstance(value, Words) else Relation((name, value), ("=",))


def as_product(words: Words) -> Expr | None:
    """Return up to three letters as a product of symbols, the other reading of "xy"."""
    tokens = [Token("symbol", letter, place, place + 1) for place, letter in enumerate(words.letters)]
    return Grammar(words.letters, tokens).expression() if tokens else None


def _read_mathematics(plain: str) -> Value:
    plain = standard_notation(plain)
    based = _BASE.fullmatch(plain)
    if based:
        base = (based["named"] or based["index"] or _PREFIX_BASES[based["letter"]]).lower()
        if base.isdigit() or base in CARDINALS:
            return read_based(f"{(based['digits'] or based['rest']).upper()}_{CARDINALS.get(base, base)}")
    plain = _without_dollars(plain)
    plain = re.sub(r"(?<=[a-zA-Z])\s+in\s+(?=[(\[{\\])", "∈", plain)
    plain = join_numbers(plain)
    reader = _Reader(plain, tokens_of(plain))
    return reader.whole()


def _without_dollars(text: str) -> str:
    """Remove the dollar signs that mark formulas, and keep those that are currency."""
    if "$" not in text or len(_CURRENCY.findall(text)) == text.count("$") or re.fullmatch(r"[^$]*\d\s?\$", text):
        return text
    if text.count("$") % 2:
        raise UnreadableError("a single '$'")
    return " ".join(text.replace("$", " ").split())


def _read_ratio(plain: str) -> Ratio | None:
    """Read "3:4", "3 to 4" or "1:2:3"."""
    parts = re.split(_SEPARATOR, plain)
    if not 2 <= len(parts) <= 6 or "\\{" in plain:
        return None
    try:
        values = [_read_mathematics(part) for part in parts if part]
    except UnreadableError:
        return None
    expressions = tuple(value for value in map(formula_of, values) if value is not None)
    return Ratio(expressions) if len(expressions) == len(parts) else None


class _Reader(Grammar):
    """Reader of lists, relations, sets, matrices and quantities."""

    _readings = 0

    def whole(self) -> Value:
        """Read all tokens as one answer."""
        value = self._list()
        if self.next.kind != "end":
            raise self.unreadable()
        return value

    def _list(self) -> Value:
        """Read statements between separators."""
        items, joiner = self._items(self._alternatives)
        return items[0] if len(items) == 1 else Sequence("", tuple(items), joiner)

    def _items(self, read: Callable[[], list[Value]]) -> tuple[list[Value], str]:
        """Return all items, and the word between them: "or", "and" or a comma."""
        items, joiners = read(), set()
        while self.takes(",", ";", "and", "or"):
            self.takes("and", "or")
            joiners.add(self.tokens[self.place - 1].text)
            items += read()
        return items, next((word for word in ("or", "and") if word in joiners), ",")

    def _alternatives(self) -> list[Value]:
        """Read a statement once for each choice of its plus-minus signs.

        The signs of a tuple, and those with a minus-plus sign among them, change together.
        """
        start, tokens = self.place, list(self.tokens)
        value = self._statement()
        places = [place for place in range(start, self.place) if self.tokens[place].text in ("±", "∓")]
        if not places:
            return [value]
        coupled = any(self.tokens[place].text == "∓" for place in places)
        if len(places) > 1 and not coupled and isinstance(value, Sequence):
            raise UnreadableError("a tuple with several plus-minus signs")
        self._readings += 2 if coupled else 2 ** len(places)
        if self._readings > MAX_READINGS:
            raise UnreadableError("too many plus-minus signs")
        choices = [(1,) * len(places), (-1,) * len(places)] if coupled else list(product((1, -1), repeat=len(places)))
        values = []
        for choice in choices:
            self.place, self.tokens = start, list(tokens)
            for place, sign in zip(places, choice, strict=True):
                is_plus = (tokens[place].text == "±") is (sign == 1)
                self.tokens[place] = replace(tokens[place], text="+" if is_plus else "-")
            values.append(self._statement())
        return values

    def _statement(self) -> Value:
        """Read a value or a chain of relations."""
        sides, signs = [symbol("") if self.is_sign("≈") else self._set()], []
        while self.is_sign(*_RELATIONS):
            signs.append(self.take().text)
            sides.append(self._set())
        if self.takes("≡"):
            sides = [self._set()]
        if self.is_sign("mod") or self.at_modulus():
            return self._congruence(sides[0])
        return Relation(tuple(sides), tuple(signs)) if signs else sides[0]

    def _congruence(self, residue: Value) -> Congruence:
        bracket = self.takes("(")
        self.expect("mod")
        modulus = self.group() if self.is_sign("{") else self.expression()
        if bracket:
            self.expect(")")
        if not isinstance(residue, Expr):
            raise self.unreadable("expected a number before 'mod'")
        return Congruence(residue, modulus)

    def _set(self) -> Value:
        """Read values between the operators of sets."""
        first, rest = self._value(), []
        while self.is_sign(*_SETS):
            operator = _SETS[self.take().text]
            rest.append((operator, self._value()))
        return Union(first, tuple(rest)) if rest else first

    def _value(self) -> Value:
        token = self.next
        if token.kind == "command" and token.text == "emptyset":
            self.take()
            return Sequence("{}", ())
        if token.kind == "command" and token.text == "mathbb":
            return self._field()
        if token.kind == "based":
            return read_based(self.take().text)
        if token.kind == "matrix":
            return self._matrix()
        if self.is_sign(*_PAIRS) and self._is_bracketed():
            return self._bracketed()
        is_negative = self.is_sign("-") and self.later().kind == "sign" and self.later().text in CURRENCIES  # -$5
        self.place += is_negative
        prefix = self.take().text if self.is_sign(*CURRENCIES) else ""
        value = apply("negate", self.expression()) if is_negative else self.expression()
        if self.next.kind == "matrix":
            return self._scaled(value, self._matrix())
        quantity = None if prefix else amount_of(value, spaced=True)
        if quantity:
            return self._with_more(quantity)
        if not self._at_end():
            return self._quantity(value, prefix)
        angle = value.args[0] if value.op == "negate" else value
        if not prefix and angle.op == "degree":
            return Quantity(apply("negate", *angle.args) if angle is not value else angle.args[0], _known("°"))
        return Quantity(value, _known(prefix)) if prefix else value

    def _at_end(self) -> bool:
        stops = (*_RELATIONS, *_SETS, ",", ";", "and", "or", ")", "]", r"\}", "}", "⟩", "mod", "≡", "|", ":")
        return self.next.kind == "end" or self.is_sign(*stops) or self.at_modulus()

    def _quantity(self, value: Expr, prefix: str) -> Value:
        """Read the unit after an amount."""
        text, self.place = self.rest(), self.unit_end()
        per = prefix and text.startswith(("/", "per"))
        unit = read_unit(f"{prefix} {text}" if per else text, nouns=not value.symbols())
        if unit is None or (prefix and not per and unit != _known(prefix)):
            raise self.unreadable(f"expected a unit, found {text[:30]!r}")
        return self._with_more(Quantity(value, unit))

    def _with_more(self, quantity: Quantity) -> Quantity:
        """Read further amounts with units, such as 30 minutes in "2 hours 30 minutes"."""
        if self.is_sign("and") or (self.is_sign(",") and not quantity.product):
            return self._and_smaller(quantity)
        if self._at_end():
            return quantity
        other = self._value()
        if not isinstance(other, Quantity) or other.unit.dimension != quantity.unit.dimension:
            raise self.unreadable("two amounts with different units")
        return _sum(quantity, other)

    def _and_smaller(self, quantity: Quantity) -> Quantity:
        """Read "2 hours and 30 minutes": an amount in a smaller unit of the same kind is added."""
        start = self.place
        self.take()
        other: Value | None
        try:
            other = self._value()
        except UnreadableError:
            other = None
        same_kind = isinstance(other, Quantity) and other.unit.dimension == quantity.unit.dimension
        if isinstance(other, Quantity) and same_kind and other.unit.factor < quantity.unit.factor:
            return _sum(quantity, other)
        self.place = start
        return quantity

    def _is_bracketed(self) -> bool:
        """Return whether a bracket encloses a list, an interval or a set rather than a factor."""
        depth, comma = 0, False
        for place in range(self.place, len(self.tokens)):
            token = self.tokens[place]
            if token.kind != "sign":
                continue
            if token.text in ("(", "[", r"\{", "{", "⟨"):
                depth += 1
            elif token.text in (")", "]", r"\}", "}", "⟩"):
                depth -= 1
                if depth == 0:
                    if self.next.text == "{":
                        return comma or place == self.place + 1 or self._is_builder(1)
                    is_whole = self.place == 0 and place == len(self.tokens) - 1
                    return comma or self.next.text in (r"\{", "⟨") or (self.next.text == "[" and is_whole)
            elif depth == 1 and token.text in (",", ";"):
                comma = True
        return False

    def _bracketed(self) -> Value:
        opening = self.take().text
        brackets = {"{": "{}", r"\{": "{}", "⟨": "("}.get(opening, opening)
        closings = _PAIRS[opening]
        if self.takes(*closings):
            return Sequence("{}" if brackets == "{}" else f"{opening}{closings[0]}", ())
        if brackets == "{}" and self._is_builder():
            return self._builder(closings[0])
        items, _ = self._items(self._alternatives if brackets == "{}" else lambda: [self._statement()])
        if not self.is_sign(*closings):
            raise self.unreadable("expected a closing bracket")
        closing = self.take().text
        return Sequence(brackets if brackets == "{}" else brackets + closing.replace("⟩", ")"), tuple(items))

    def _is_builder(self, ahead: int = 0) -> bool:
        return self.later(ahead).kind == "symbol" and self.later(ahead + 1).text in ("|", ":", "∈")

    def _builder(self, closing: str) -> Value:
        r"""Read \{x | x > 3\} and \{x \in \mathbb{R} : x > 3\} as the relation after the bar."""
        self.take()
        if self.takes("∈"):
            self._field()
        if not self.takes("|", ":"):
            raise self.unreadable("expected '|'")
        condition = self._list()
        self.expect(closing)
        return condition

    def _field(self) -> Value:
        self.take()
        if self.group() != symbol("R"):
            raise self.unreadable("a set of numbers other than R")
        return REAL_LINE

    def _matrix(self) -> Matrix:
        """Read the cells of a matrix, each as a value of its own."""
        content = re.fullmatch(
            r"\W*?begin\s*\{([pbB]?matrix|smallmatrix|array)\}(?:\s*\{[lcr| ]*\})?(.*?)\\end\s*\{\1\}\W*",
            self.take().text,
            re.DOTALL,
        )
        if content is None:
            raise UnreadableError("an environment other than matrix, pmatrix, bmatrix and array")
        lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", content[2]) if line.strip()]
        rows = tuple(tuple(_read_mathematics(cell.strip()) for cell in line.split("&")) for line in lines)
        if not rows or len({len(row) for row in rows}) != 1:
            raise UnreadableError("a matrix with rows of different lengths")
        return Matrix(rows)

    def _scaled(self, factor: Expr, matrix: Matrix) -> Matrix:
        rows = []
        for row in matrix.rows:
            cells = [cell for cell in map(formula_of, row) if cell is not None]
            if len(cells) < len(row):
                raise self.unreadable("a factor of a matrix that is not of numbers")
            rows.append(tuple(apply("multiply", factor, cell) for cell in cells))
        return Matrix(tuple(rows))


def _sum(quantity: Quantity, other: Quantity) -> Quantity:
    """Return the sum of two amounts of the same kind, in the unit of the first."""
    factor = number(other.unit.factor / quantity.unit.factor)
    return Quantity(apply("add", quantity.amount, apply("multiply", other.amount, factor)), quantity.unit)


def _known(name: str) -> Unit:
    unit = read_unit(name, nouns=False)
    if unit is None:
        raise UnreadableError(f"the unit {name!r}")
    return unit
