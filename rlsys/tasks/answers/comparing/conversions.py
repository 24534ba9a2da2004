"""Other readings of a value, chosen after the value that it is compared with."""

from __future__ import annotations

from fractions import Fraction
from math import gcd

from rlsys.tasks.answers.reading.letters import amount_of
from rlsys.tasks.answers.reading.reader import as_product
from rlsys.tasks.answers.values import (
    REAL_LINE,
    Based,
    Clock,
    Expr,
    Marks,
    Quantity,
    Ratio,
    Unit,
    Value,
    Words,
    apply,
    number,
    symbol,
)

_PAIR = 2
# What ' and " stand for, in base units.
_MARKS = {
    "metre": (Fraction(381, 1250), Fraction(127, 5000)),
    "degree": (Fraction(1, 60), Fraction(1, 3600)),
    "second": (Fraction(60), Fraction(1)),
}
DEGREE, RADIAN = (("degree", 1),), (("radian", 1),)


def like(value: Value, other: Value, *, is_reference: bool) -> Value:
    """Return a value in the reading that another value has, or as it is.

    Letters are also a product, a time is also a ratio, and a ratio of two numbers is also their quotient. "5 m" is a
    product beside a formula, and "5m" has a unit beside an amount whose unit is certain.
    """
    if other == REAL_LINE and value == symbol("R"):
        return REAL_LINE
    if isinstance(value, Words) and not isinstance(other, Words):
        return as_product(value) or value
    if isinstance(value, Clock) and not isinstance(other, Clock):
        value = _clock_ratio(value, reduced=is_reference or not isinstance(other, Ratio)) or value
    if isinstance(value, Ratio) and len(value.parts) == _PAIR and isinstance(other, Expr):
        return apply("divide", *value.parts)
    if isinstance(value, Based) and value.base == 10 and not isinstance(other, Based):
        return number(int(value.digits))
    if isinstance(value, Marks):
        return _measured(value, other)
    if isinstance(value, Quantity) and value.product and isinstance(other, Expr) and other.symbols():
        return value.product
    if isinstance(value, Expr) and isinstance(other, Quantity) and not other.product:
        return amount_of(value, spaced=False) or value
    return value


def _clock_ratio(clock: Clock, *, reduced: bool) -> Ratio | None:
    """Return a time without am or pm as a ratio, in lowest terms if `reduced`, the other reading of "5:12"."""
    if clock.half or clock.second or (reduced and gcd(clock.hour, clock.minute) != 1):
        return None
    return Ratio((number(clock.hour), number(clock.minute)))


def _measured(marks: Marks, other: Value) -> Value:
    """Return amounts before ' and " in the unit of another value, or as a number."""
    if isinstance(other, Quantity) and len(other.unit.dimension) == 1 and other.unit.dimension[0][0] in _MARKS:
        first, second = _MARKS[other.unit.dimension[0][0]]
        total = (marks.first or 0) * first + (marks.second or 0) * second
        return Quantity(number(total), Unit(other.unit.dimension))
    amounts = [amount for amount in (marks.first, marks.second) if amount is not None]
    return number(amounts[0]) if isinstance(other, Expr) and len(amounts) == 1 else marks


def radians(quantity: Quantity) -> Expr:
    """Return the amount of an angle in radians."""
    return apply("degree", quantity.amount) if quantity.unit.dimension == DEGREE else quantity.amount
