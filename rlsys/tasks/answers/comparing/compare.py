"""Comparison of the values of a reference and an answer, kind by kind."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from fractions import Fraction

from rlsys.tasks.answers.comparing import numeric, relations
from rlsys.tasks.answers.comparing.conversions import DEGREE, RADIAN, like, radians
from rlsys.tasks.answers.comparing.sets import INTERVALS, same_set
from rlsys.tasks.answers.reading.letters import is_certain
from rlsys.tasks.answers.reading.units import same_dimension
from rlsys.tasks.answers.reading.words import same_words
from rlsys.tasks.answers.values import (
    Clock,
    Congruence,
    Expr,
    Marks,
    Matrix,
    Quantity,
    Ratio,
    Relation,
    Sequence,
    UndecidableError,
    Union,
    Value,
    Words,
    apply,
    number,
)

MAX_ITEMS = 64
_PAIR = 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison with fixed rules.

    Attributes:
        relative_tolerance: Largest relative difference from a reference that is a decimal. The difference is always
            smaller than half a unit of the last digit of the reference.
        lenient: Accept a missing or added percent sign, and a decimal that is the exact reference rounded to at least
            three digits.
    """

    relative_tolerance: Fraction = Fraction(1, 10**6)
    lenient: bool = False

    def same(self, reference: Value, answer: Value) -> bool:
        """Return whether an answer has the value of a reference.

        Raises:
            UndecidableError: the values cannot be compared.
        """
        reference, answer = like(reference, answer, is_reference=True), like(answer, reference, is_reference=False)
        kinds = (type(reference), type(answer))
        if Relation in kinds:
            return self._same_relation(reference, answer)
        if Union in kinds or _is_alternative(reference) or _is_alternative(answer):
            return self._same_parts(reference, answer) or same_set(reference, answer)
        if Matrix in kinds:
            return self._same_matrix(reference, answer)
        match reference, answer:
            case Expr(), Expr():
                return self._same_expression(reference, answer)
            case Sequence(), Sequence():
                return self._same_sequence(reference, answer)
            case (Sequence(), _) | (_, Sequence()):
                return self._same_single(reference, answer)
            case (Quantity(), _) | (_, Quantity()):
                return self._same_quantity(reference, answer)
            case Words(), Words():
                return same_words(reference, answer)
            case Clock(), Clock():
                return _same_clock(reference, answer)
            case Ratio(), Ratio():
                return _same_ratio(reference, answer)
            case Congruence(), Congruence():
                return relations.same_residues(reference, answer)
            case (Marks(), _) | (_, Marks()) if reference != answer:
                raise UndecidableError("' and \" are feet and inches, or minutes and seconds")
        return reference == answer

    def _same_parts(self, reference: Value, answer: Value) -> bool:
        """Compare unions or alternatives part by part, in any order: the sets and points in them may be unknown."""
        match reference, answer:
            case Union(), Union():
                operators = {operator for one in (reference, answer) for operator, _ in one.rest}
                parts = [[one.first, *(item for _, item in one.rest)] for one in (reference, answer)]
                return operators in ({"union"}, {"intersection"}) and self._same_unordered(*parts)
            case Sequence(brackets="", joiner=","), Sequence(brackets="", joiner="or"):
                return self._same_unordered(reference.items, answer.items)
        return False

    def _same_relation(self, reference: Value, answer: Value) -> bool:
        """Compare equations, inequalities and memberships."""
        left, right = (relations.chain_of(value, self.same) for value in (reference, answer))
        if left and right and (left.names <= right.names or (not right.names and not _has_formula(answer))):
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
        decimal = reference.exact if _is_decimal(reference.exact) else reference.rounded
        given = [value for value in (answer.rounded, answer.exact) if value is not None]
        return decimal is not None and any(self.same(decimal, value) for value in given)

    def _same_single(self, reference: Value, answer: Value) -> bool:
        """Compare a set or list of one item with this item."""
        items = [
            value.items[0]
            if isinstance(value, Sequence) and value.brackets in ("", "{}", "[]") and len(value.items) == 1
            else value
            for value in (reference, answer)
        ]
        return not any(isinstance(item, Sequence) for item in items) and self.same(*items)

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
        if isinstance(reference, Sequence) or isinstance(answer, Sequence):  # a tuple is a column or a row
            left, right = _as_row(left), _as_row(right)
        if not left or [len(row) for row in left] != [len(row) for row in right]:
            return False
        return all(
            self.same(one, other) for rows in zip(left, right, strict=True) for one, other in zip(*rows, strict=True)
        )

    def _same_quantity(self, reference: Value, answer: Value) -> bool:
        """Compare amounts with units. A missing unit is right."""
        if isinstance(reference, Quantity) and isinstance(answer, Quantity):
            if {reference.unit.dimension, answer.unit.dimension} == {DEGREE, RADIAN}:
                return self.same(radians(reference), radians(answer))
            if not same_dimension(reference.unit, answer.unit):
                return False
            factor = answer.unit.factor / reference.unit.factor
            amount = answer.amount if factor == 1 else apply("multiply", answer.amount, number(factor))
            return self.same(reference.amount, amount)
        if isinstance(reference, Quantity) and isinstance(answer, Expr):
            if not is_certain(reference, is_reference=True):
                return False
            return self.same(reference.amount, answer) or (
                _is_angle(reference, answer) and self.same(radians(reference), answer)
            )
        if isinstance(answer, Quantity) and isinstance(reference, Expr):
            counted = answer.unit.counted or _is_at_most_one(answer.amount)
            if reference.op == "percent" or not counted or not is_certain(answer, is_reference=False):
                return False
            return self.same(reference, answer.amount) or (
                _is_angle(answer, reference) and self.same(reference, radians(answer))
            )
        return False

    def _same_expression(self, reference: Expr, answer: Expr) -> bool:
        if _has_constant(reference) and "C" not in answer.symbols():  # of an integral
            answer = _with_capital(answer)
        if numeric.equal(reference, answer, self._tolerance(reference)):
            return True
        return self.lenient and self._nearly_same(reference, answer)

    def _tolerance(self, reference: Expr) -> Fraction:
        """Return the largest difference from a reference; 0 unless it is a decimal."""
        decimal = numeric.decimal_of(reference)
        if decimal is None:
            return Fraction(0)
        value, step = decimal
        # Less than half a unit: 0.5 steps away, a value is as near to the next number.
        return min(abs(value) * self.relative_tolerance, step * Fraction(499, 1000))

    def _nearly_same(self, reference: Expr, answer: Expr) -> bool:
        """Compare without percent signs, and a decimal answer with the rounded reference."""
        if (reference.op == "percent") != (answer.op == "percent"):
            left, right = (expr.args[0] if expr.op == "percent" else expr for expr in (reference, answer))
            return numeric.equal(left, right, self._tolerance(left))
        decimal = numeric.decimal_of(answer)
        if decimal is None or reference.symbols():
            return False
        value, step = decimal
        return abs(value) >= 100 * step and numeric.equal(reference, answer, step / 2)


def _has_constant(reference: Expr) -> bool:
    """Return whether a formula ends with "+ C"."""
    return reference.op == "add" and reference.args[1].name == "C" and "c" not in reference.symbols()


def _with_capital(expr: Expr) -> Expr:
    """Return an expression with C in place of c."""
    return replace(expr, name="C" if expr.name == "c" else expr.name, args=tuple(map(_with_capital, expr.args)))


def _has_formula(value: Value) -> bool:
    """Return whether a value is an equation of formulas, such as 2x = x + x."""
    sides = value.sides if isinstance(value, Relation) else ()
    return any(isinstance(side, Expr) and side.symbols() for side in sides)


def _is_decimal(value: Value | None) -> bool:
    amount = value.amount if isinstance(value, Quantity) else value
    return isinstance(amount, Expr) and numeric.decimal_of(amount) is not None


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


def _is_alternative(value: Value) -> bool:
    """Return whether a value is a list of intervals or inequalities, such as "x < 2 or x > 3"."""
    if not isinstance(value, Sequence) or value.brackets or not all(map(_is_range, value.items)):
        return False
    inequalities = sum(isinstance(item, Relation) for item in value.items)
    return value.joiner == "or" or inequalities == len(value.items) or (value.joiner == "and" and inequalities > 0)


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


def _rows(value: Value) -> tuple[tuple[Value, ...], ...]:
    """Return the rows of a matrix, of a nested list, or of a tuple; none for other values."""
    if isinstance(value, Matrix):
        return value.rows
    if not isinstance(value, Sequence) or value.brackets not in ("()", "[]"):
        return ()
    rows = tuple(item.items for item in value.items if isinstance(item, Sequence) and item.brackets in ("()", "[]"))
    if rows and len(rows) == len(value.items):
        return rows if len({len(row) for row in rows}) == 1 else ()
    return (value.items,)


def _as_row(rows: tuple[tuple[Value, ...], ...]) -> tuple[tuple[Value, ...], ...]:
    return (tuple(row[0] for row in rows),) if all(len(row) == 1 for row in rows) else rows


def _is_angle(quantity: Quantity, other: Expr) -> bool:
    """Return whether an angle in degrees is compared with a multiple of pi."""
    return quantity.unit.dimension == DEGREE and any(node.op == "pi" for node in other.walk())


def _is_at_most_one(amount: Expr) -> bool:
    if amount.op == "divide" and all(part.op == "number" for part in amount.args):
        return amount.args[0].value <= amount.args[1].value
    return amount.op == "number" and amount.value <= 1
