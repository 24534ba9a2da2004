"""Comparison of the values of a reference and an answer, kind by kind."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from rlsys.tasks.answers import numeric, relations
from rlsys.tasks.answers.expressions import (
    Based,
    Clock,
    Congruence,
    Date,
    Expr,
    Marks,
    Matrix,
    Quantity,
    Ratio,
    Relation,
    Sequence,
    UndecidableError,
    Union,
    Unit,
    Value,
    Words,
    apply,
    number,
)
from rlsys.tasks.answers.reader import as_product
from rlsys.tasks.answers.sets import INTERVALS, same_set
from rlsys.tasks.answers.units import SYMBOL_UNITS, read_unit, same_dimension
from rlsys.tasks.answers.words import same_words

MAX_ITEMS = 64
_PAIR = 2
# Base units of what ' and " stand for.
_MARKS = {
    "metre": (Fraction(381, 1250), Fraction(127, 5000)),
    "degree": (Fraction(1, 60), Fraction(1, 3600)),
    "second": (Fraction(60), Fraction(1)),
}
_DEGREE, _RADIAN = (("degree", 1),), (("radian", 1),)


@dataclass(frozen=True, slots=True)
class Rules:
    """Choices of a comparison.

    Attributes:
        relative_tolerance: Largest relative difference from a reference that is a decimal. The difference is always
            smaller than half a unit of the last digit of the reference.
        lenient: Accept a missing or added percent sign, and a decimal that is the exact reference rounded to at least
            three digits.
    """

    relative_tolerance: Fraction = Fraction(1, 10**6)
    lenient: bool = False


class Comparison:
    """Comparison under the same rules."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def same(self, reference: Value, answer: Value) -> bool:
        """Return whether an answer has the value of a reference.

        Raises:
            UndecidableError: the values cannot be compared.
        """
        reference, answer = relations.spread_signs(reference), relations.spread_signs(answer)
        layers = (self._same_words, self._same_relation, self._same_collection, self._same_marks, self._same_quantity)
        for layer in layers:
            verdict = layer(reference, answer)
            if verdict is not None:
                return verdict
        if isinstance(reference, Expr) and isinstance(answer, Expr):
            return self._same_expression(reference, answer)
        if isinstance(reference, Congruence) and isinstance(answer, Congruence):
            return relations.same_residues(reference, answer)
        return reference == answer

    def _same_words(self, reference: Value, answer: Value) -> bool | None:
        if isinstance(reference, Words) and isinstance(answer, Words):
            return same_words(reference, answer)
        if isinstance(reference, Words) or isinstance(answer, Words):
            left, right = (_maybe_product(value) for value in (reference, answer))
            return False if left is None or right is None else self.same(left, right)
        if isinstance(reference, Clock) and isinstance(answer, Clock):
            return _same_clock(reference, answer)
        if isinstance(reference, Clock) or isinstance(answer, Clock):
            reduced = not isinstance(reference, Ratio)
            left, right = (
                _clock_ratio(value, reduced) if isinstance(value, Clock) else value for value in (reference, answer)
            )
            return left is not None and right is not None and self.same(left, right)
        if isinstance(reference, Date) or isinstance(answer, Date):
            return reference == answer
        return None

    def _same_relation(self, reference: Value, answer: Value) -> bool | None:
        """Compare equations, inequalities and memberships."""
        if not isinstance(reference, Relation) and not isinstance(answer, Relation):
            return None
        left, right = (relations.chain_of(value, self.same) for value in (reference, answer))
        if left and right and (left.names <= right.names or (not right.names and not _is_identity(answer))):
            return self._same_chain(left, right)
        if isinstance(reference, Relation) and isinstance(answer, Relation):
            same = relations.same_relation(reference, answer)
            if same is not None:
                return same
        return same_set(reference, answer)

    def _same_chain(self, reference: relations.Chain, answer: relations.Chain) -> bool:
        """Compare exact values; a rounded value is right only where the reference is a decimal."""
        if reference.exact is not None and answer.exact is not None and self.same(reference.exact, answer.exact):
            return True
        decimals = (
            [reference.rounded] if reference.exact is None or not _is_decimal(reference.exact) else [reference.exact]
        )
        return any(
            one is not None and other is not None and self.same(one, other)
            for one in decimals
            for other in (answer.rounded, answer.exact)
        )

    def _same_collection(self, reference: Value, answer: Value) -> bool | None:
        if isinstance(reference, Union) or isinstance(answer, Union) or _is_alternative(reference, answer):
            return same_set(reference, answer)
        if isinstance(reference, Matrix) or isinstance(answer, Matrix):
            return self._same_matrix(reference, answer)
        if isinstance(reference, Sequence) and isinstance(answer, Sequence):
            return self._same_sequence(reference, answer)
        for one, other in ((reference, answer), (answer, reference)):
            if isinstance(one, Sequence):
                # A set or list with one item is this item.
                single = one.brackets in ("", "{}", "[]") and len(one.items) == 1
                return single and (
                    self.same(one.items[0], answer) if one is reference else self.same(reference, one.items[0])
                )
            del other
        return None

    def _same_sequence(self, reference: Sequence, answer: Sequence) -> bool:
        unordered = ("", "{}")
        (names, left), (others, right) = map(relations.named_values, (reference, answer))
        if names and others and names != others:
            return False
        if len(names) > 1 or len(others) > 1:  # a tuple has the unknowns in the order of their names
            if reference.brackets in unordered and len({name.partition("_")[0] for name in others}) == 1:
                return not names and self._same_unordered(left, right)  # x_1 = 1, x_2 = 2 for 2, 1
            plain = all(one.brackets in ("", "()", "{}") and one.joiner != "or" for one in (reference, answer))
            return plain and len(left) == len(right) and all(map(self.same, left, right))
        if reference.brackets in unordered and answer.brackets in unordered:
            if any(isinstance(item, Words) for item in left) and (reference.joiner == "or") != (answer.joiner == "or"):
                return False
            if "{}" in (reference.brackets, answer.brackets):
                left, right = self._distinct(left), self._distinct(right)
            return self._same_unordered(left, right)
        if reference.brackets != answer.brackets and not _is_bare_tuple(reference, answer):
            return False
        return len(left) == len(right) and all(map(self._same_item, left, right))

    def _same_unordered(self, left: Items[Value], right: Items[Value]) -> bool:
        """Return whether every item of one list has its own partner in the other."""
        if len(left) != len(right):
            return False
        if len(left) > MAX_ITEMS:
            raise UndecidableError(f"a list with more than {MAX_ITEMS} items")
        remaining = list(right)
        for item in left:
            partner = next((place for place, other in enumerate(remaining) if self._same_item(item, other)), None)
            if partner is None:
                return False
            del remaining[partner]
        return True

    def _same_item(self, one: Value, other: Value) -> bool:
        """Compare items: a set with one item is not this item here."""
        return isinstance(one, Sequence) is isinstance(other, Sequence) and self.same(one, other)

    def _distinct(self, items: Items[Value]) -> list[Value]:
        kept: list[Value] = []
        for item in items[: MAX_ITEMS + 1]:
            if not any(self.same(other, item) for other in kept):
                kept.append(item)
        return kept

    def _same_matrix(self, reference: Value, answer: Value) -> bool:
        left, right = _rows(reference), _rows(answer)
        if left is None or right is None:
            return False
        vector = Matrix in map(type, (reference, answer)) and Sequence in map(type, (reference, answer))
        if vector:  # a tuple is a column or a row
            left, right = (_as_row(rows) for rows in (left, right))
        if [len(row) for row in left] != [len(row) for row in right]:
            return False
        return all(
            self.same(one, other) for rows in zip(left, right, strict=True) for one, other in zip(*rows, strict=True)
        )

    def _same_marks(self, reference: Value, answer: Value) -> bool | None:
        """Compare feet and inches, or minutes and seconds. The unit of the other side says which."""
        if not isinstance(reference, Marks) and not isinstance(answer, Marks):
            return None
        left, right = _in_unit_of(reference, answer), _in_unit_of(answer, reference)
        if isinstance(left, Marks) or isinstance(right, Marks):
            if left == right:
                return True
            raise UndecidableError("' and \" are feet and inches, or minutes and seconds")
        return self.same(left, right)

    def _same_quantity(self, reference: Value, answer: Value) -> bool | None:
        """Compare amounts with units, numbers in other bases, and ratios."""
        if isinstance(reference, Based):
            # The same number in another base is wrong: the question may ask to convert it.
            return answer == reference
        if isinstance(answer, Based):
            return answer.base == 10 and self.same(reference, number(int(answer.digits)))
        if isinstance(reference, Ratio) and isinstance(answer, Ratio):
            return _same_ratio(reference, answer)
        for one, other, ordered in ((reference, answer, True), (answer, reference, False)):
            if isinstance(one, Ratio):
                if len(one.parts) != _PAIR or isinstance(other, Quantity):
                    return False
                quotient = apply("divide", *one.parts)
                return self.same(quotient, other) if ordered else self.same(other, quotient)
        if isinstance(reference, Quantity):
            answer = _glued(answer)
        if isinstance(reference, Quantity) and isinstance(answer, Quantity):
            if {reference.unit.dimension, answer.unit.dimension} == {_DEGREE, _RADIAN}:
                return self.same(_radians(reference), _radians(answer))
            if not same_dimension(reference.unit, answer.unit):
                return False
            factor = answer.unit.factor / reference.unit.factor
            amount = answer.amount if factor == 1 else apply("multiply", answer.amount, number(factor))
            return self.same(reference.amount, amount)
        if isinstance(reference, Quantity) and isinstance(answer, Expr):
            return self.same(reference.amount, answer) or (
                _is_angle(reference, answer) and self.same(_radians(reference), answer)
            )
        if isinstance(answer, Quantity) and isinstance(reference, Expr):
            if reference.op == "percent" or not (answer.unit.counted or _is_at_most_one(answer.amount)):
                return False
            return self.same(reference, answer.amount) or (
                _is_angle(answer, reference) and self.same(reference, _radians(answer))
            )
        return None

    def _same_expression(self, reference: Expr, answer: Expr) -> bool:
        if numeric.equal(reference, answer, self._tolerance(reference)):
            return True
        return self._rules.lenient and self._nearly_same(reference, answer)

    def _tolerance(self, reference: Expr) -> Fraction:
        """Return the largest difference from a reference; 0 unless it is a decimal."""
        decimal = numeric.decimal_of(reference)
        if decimal is None:
            return Fraction(0)
        value, step = decimal
        # Less than half a unit: 0.5 steps away, a value is as near to the next number.
        return min(abs(value) * self._rules.relative_tolerance, step * Fraction(499, 1000))

    def _nearly_same(self, reference: Expr, answer: Expr) -> bool:
        """Compare without percent signs, and a decimal answer with the rounded reference."""
        percents = [expr.op == "percent" for expr in (reference, answer)]
        if percents[0] != percents[1]:
            left, right = (expr.args[0] if expr.op == "percent" else expr for expr in (reference, answer))
            return numeric.equal(left, right, self._tolerance(left))
        decimal = numeric.decimal_of(answer)
        if decimal is None or reference.symbols():
            return False
        value, step = decimal
        return abs(value) >= 100 * step and numeric.equal(reference, answer, step / 2)


def _is_identity(value: Value) -> bool:
    """Return whether a value is an equation of formulas, such as 2x = x + x."""
    sides = value.sides if isinstance(value, Relation) else ()
    return any(isinstance(side, Expr) and side.symbols() for side in sides)


def _is_decimal(value: Value) -> bool:
    amount = value.amount if isinstance(value, Quantity) else value
    return isinstance(amount, Expr) and numeric.decimal_of(amount) is not None


def _in_unit_of(value: Value, other: Value) -> Value:
    """Return amounts before ' and " in the unit of another value: a length, an angle, a time or a number."""
    if not isinstance(value, Marks):
        return value
    if isinstance(other, Quantity) and other.unit.dimension[0][0] in _MARKS and len(other.unit.dimension) == 1:
        base = other.unit.dimension[0]
        first, second = _MARKS[base[0]]
        return Quantity(number((value.first or 0) * first + (value.second or 0) * second), Unit((base,)))
    single = value.second if value.first is None else value.first
    return (
        number(single)
        if isinstance(other, Expr) and single is not None and None in (value.first, value.second)
        else value
    )


def _maybe_product(value: Value) -> Value | None:
    return as_product(value) if isinstance(value, Words) else value


def _clock_ratio(clock: Clock, reduced: bool) -> Ratio | None:
    """Return a time without am or pm as a ratio, in lowest terms if `reduced`, the other reading of "5:12"."""
    if clock.half or clock.second or (reduced and gcd(clock.hour, clock.minute) != 1):
        return None
    return Ratio((number(clock.hour), number(clock.minute)))


def _same_clock(reference: Clock, answer: Clock) -> bool:
    """Compare times of day. A missing am or pm is accepted, another one is not."""
    times = [
        ((clock.hour % 12 + 12 * (clock.half == "pm")) if clock.half else clock.hour % 24, clock.minute, clock.second)
        for clock in (reference, answer)
    ]
    written = [(clock.hour, clock.minute, clock.second) for clock in (reference, answer)]
    return times[0] == times[1] or (written[0] == written[1] and not answer.half)


def _same_ratio(reference: Ratio, answer: Ratio) -> bool:
    if len(reference.parts) != len(answer.parts):
        return False
    first, *others = zip(reference.parts, answer.parts, strict=True)
    return all(
        numeric.equal(apply("multiply", one, first[1]), apply("multiply", other, first[0])) for one, other in others
    ) and not numeric.equal(first[1], number(0))


def _is_alternative(reference: Value, answer: Value) -> bool:
    """Return whether one side is a list of intervals or inequalities, such as "x < 2 or x > 3"."""
    return any(
        isinstance(value, Sequence)
        and not value.brackets
        and value.items
        and all(_is_range(item) for item in value.items)
        and value.joiner in ("or", "and", ",")
        and (value.joiner != "," or all(isinstance(item, Relation) for item in value.items))
        and any(isinstance(item, Relation) or value.joiner == "or" for item in value.items)
        for value in (reference, answer)
    )


def _is_range(value: Value) -> bool:
    if isinstance(value, Relation):
        return not set(value.signs) & {"=", "≈"}
    return isinstance(value, Union) or (isinstance(value, Sequence) and value.brackets in INTERVALS)


def _is_bare_tuple(reference: Sequence, answer: Sequence) -> bool:
    """Return whether an answer lacks the brackets of a tuple or list that cannot be an interval.

    A pair in rising order could be an interval, so it needs its brackets.
    """
    if {reference.brackets, answer.brackets} not in ({"", "()"}, {"", "[]"}) or reference.brackets == "":
        return {reference.brackets, answer.brackets} == {"", "[]"} and len(answer.items) > _PAIR
    if len(reference.items) != _PAIR:
        return True
    try:
        low, high = (numeric.real_value(item) for item in reference.items if isinstance(item, Expr))
    except (UndecidableError, ValueError):
        return False
    return numeric.greater(low, high)


def _rows(value: Value) -> tuple[tuple[Value, ...], ...] | None:
    """Return the rows of a matrix, of a nested list, or of a tuple."""
    if isinstance(value, Matrix):
        return value.rows
    if not isinstance(value, Sequence) or value.brackets not in ("()", "[]"):
        return None
    if all(isinstance(item, Sequence) and item.brackets in ("()", "[]") for item in value.items):
        rows = tuple(item.items for item in value.items if isinstance(item, Sequence))
        return rows if len({len(row) for row in rows}) == 1 else None
    return (value.items,)


def _as_row(rows: tuple[tuple[Value, ...], ...]) -> tuple[tuple[Value, ...], ...]:
    return (tuple(row[0] for row in rows),) if all(len(row) == 1 for row in rows) else rows


def _is_angle(quantity: Quantity, other: Expr) -> bool:
    """Return whether an angle in degrees is compared with a multiple of pi."""
    return quantity.unit.dimension == _DEGREE and any(node.op == "pi" for node in other.walk())


def _radians(quantity: Quantity) -> Expr:
    return apply("degree", quantity.amount) if quantity.unit.dimension == _DEGREE else quantity.amount


def _is_at_most_one(amount: Expr) -> bool:
    if amount.op == "divide" and all(part.op == "number" for part in amount.args):
        return amount.args[0].value <= amount.args[1].value
    return amount.op == "number" and amount.value <= 1


def _glued(answer: Value) -> Value:
    """Return "500g" or "5m/s" as an amount with a unit rather than a product."""
    amount, text = answer, ""
    while isinstance(amount, Expr) and amount.op in ("multiply", "divide"):
        base, exponent = amount.args[1], ""
        if base.op == "power" and base.args[1].op == "number":
            base, exponent = base.args[0], f"^{base.args[1].value}"
        if base.name not in SYMBOL_UNITS:
            break
        amount, text = amount.args[0], f"{' ' if amount.op == 'multiply' else '/'}{base.name}{exponent}{text}"
    unit = read_unit(text, nouns=False) if text else None
    return Quantity(amount, unit) if isinstance(amount, Expr) and unit else answer
