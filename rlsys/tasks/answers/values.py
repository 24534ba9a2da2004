"""Values that an answer can have: expressions, quantities, sequences, sets, matrices, relations and ratios."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

# The variable of a sum, product, integral or limit.
BOUND = "#"
OPERATORS = ("sum", "product", "integral", "limit")


class UnreadableError(Exception):
    """A text is not a complete answer of a known form. The message says why."""


class UndecidableError(Exception):
    """Two values cannot be compared in bounded time. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expr:
    """A node of an expression.

    Attributes:
        op: "number", "symbol", "add", "multiply", "divide", "power", "negate", "percent", "degree", the name of a
            function, or one of `OPERATORS`, whose arguments are the expression and its ends.
        value: Value of a number.
        step: Unit of the last digit of a number that is written as a decimal; None for other numbers.
        name: Name of a symbol.
        spaced: A space stands between a number and this symbol or fraction, which may be a unit then.
    """

    op: str
    args: tuple[Expr, ...] = ()
    value: Fraction = Fraction(0)
    step: Fraction | None = None
    name: str = ""
    spaced: bool = field(default=False, compare=False)

    def walk(self) -> Iterator[Expr]:
        """Yield all nodes of the expression."""
        yield self
        for argument in self.args:
            yield from argument.walk()

    def symbols(self) -> set[str]:
        """Return the names of all free symbols."""
        return {node.name for node in self.walk() if node.op == "symbol" and node.name != BOUND}


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measurement or a counted noun.

    Attributes:
        dimension: Base units with their exponents, sorted, such as (("metre", 1), ("second", -1)).
        factor: Value of the unit in base units.
        counted: False for words without a plural, which may be no noun.
    """

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Quantity:
    """An amount with a unit.

    Attributes:
        product: The same text as a product, if the letters of the unit may be variables.
    """

    amount: Expr
    unit: Unit
    product: Expr | None = None


@dataclass(frozen=True, slots=True)
class Marks:
    """Amounts before ' and ": feet and inches, or minutes and seconds of an angle or of time."""

    first: Fraction | None
    second: Fraction | None


@dataclass(frozen=True, slots=True)
class Based:
    """Digits of a number in a base other than ten."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """Values in braces ("{}", a set), in other brackets (a tuple, an interval or a list), or in none ("")."""

    brackets: str
    items: tuple[Value, ...]
    joiner: str = ","


@dataclass(frozen=True, slots=True)
class Union:
    """Sets joined by operators: "union", "intersection" or "minus", from left to right."""

    first: Value
    rest: tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """Sides with relation signs between them: = ≠ < > ≤ ≥ ≈ ∈."""

    sides: tuple[Value, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Congruence:
    """A residue class: a value modulo a number."""

    residue: Expr
    modulus: Expr


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day.

    Attributes:
        half: "am", "pm" or "" if the text does not say.
    """

    hour: int
    minute: int
    second: int
    half: str


@dataclass(frozen=True, slots=True)
class Date:
    """A date; a year of 0 is not given."""

    year: int
    month: int
    day: int


@dataclass(frozen=True, slots=True)
class Words:
    """A text of words, or a chemical formula.

    Attributes:
        text: The text in lower case, or the formula without marks of subscripts.
        letters: Up to three letters as they were written, which may also be a product.
    """

    text: str
    formula: bool = False
    letters: str = ""


Value = (
    Expr | Quantity | Marks | Based | Sequence | Union | Matrix | Relation | Ratio | Congruence | Clock | Date | Words
)


def number(value: Fraction | int, step: Fraction | None = None) -> Expr:
    """Return a number."""
    return Expr(op="number", value=Fraction(value), step=step)


def symbol(name: str) -> Expr:
    """Return a symbol."""
    return Expr(op="symbol", name=name)


def apply(op: str, *args: Expr) -> Expr:
    """Return an operation on arguments."""
    return Expr(op=op, args=args)


def formula_of(value: Value) -> Expr | None:
    """Return a value as an expression, in which the letters of a unit may be variables."""
    return value.product if isinstance(value, Quantity) else value if isinstance(value, Expr) else None


REAL_LINE = Sequence("()", (apply("negate", apply("infinity")), apply("infinity")))


def names_of(text: str) -> tuple[str, ...]:
    """Return the names that a text lists between spaces."""
    return tuple(text.split())
