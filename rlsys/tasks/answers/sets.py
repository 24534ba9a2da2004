"""Sets of real numbers: intervals, unions, inequalities of one unknown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cmp_to_key, reduce
from typing import Any

from rlsys.tasks.answers import numeric
from rlsys.tasks.answers.evaluate import AGREED_BITS
from rlsys.tasks.answers.expressions import Expr, Relation, Sequence, UndecidableError, Union, Value, apply, number

_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
_INTERVALS = ("()", "[)", "(]", "[]")


@dataclass(frozen=True, slots=True)
class Bound:
    """An end of an interval, or a point between the numbers just below and just above a value.

    Attributes:
        value: Real number or infinity.
        side: -1 just below the value, 1 just above it.
    """

    value: Any
    side: int


@dataclass(frozen=True, slots=True, eq=False)
class RealSet:
    """Disjoint intervals in rising order; `variable` is "" unless the set comes from an inequality."""

    intervals: tuple[tuple[Bound, Bound], ...]
    variable: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RealSet) or (self.variable and other.variable and self.variable != other.variable):
            return False
        pairs = [bounds for one in (self, other) for bounds in [[b for pair in one.intervals for b in pair]]]
        return len(pairs[0]) == len(pairs[1]) and all(map(lambda one, two: _order(one, two) == 0, *pairs))

    __hash__ = None  # type: ignore[assignment]


def real_set(value: Value) -> RealSet | None:
    """Return the set of real numbers that a value describes, or None.

    Raises:
        UndecidableError: an end is not a real number.
    """
    if isinstance(value, Relation):
        return _of_relation(value)
    if isinstance(value, Union):
        return _of_union(value)
    if not isinstance(value, Sequence):
        return None
    if value.brackets in _INTERVALS and len(value.items) == 2 and all(isinstance(item, Expr) for item in value.items):
        low, high = (_number(item) for item in value.items)
        if numeric.greater(low, high):
            return None  # a pair
        return _interval(low, high, value.brackets[0] == "[", value.brackets[1] == "]")
    if value.brackets == "{}" and all(isinstance(item, Expr) for item in value.items):
        return _merged([_point(_number(item)) for item in value.items])
    if value.brackets == "" and value.items:
        sets = [real_set(item) for item in value.items]
        if all(one is not None for one in sets):
            return _joined(value.joiner, [one for one in sets if one is not None])
    return None


def _number(value: Value) -> Any:
    if not isinstance(value, Expr):
        raise UndecidableError("an end of an interval that is not a number")
    return numeric.real_value(value)


def _joined(joiner: str, sets: list[RealSet]) -> RealSet | None:
    """Join sets by "or", others by "and"; None if an item changes nothing."""
    variables = {one.variable for one in sets if one.variable}
    if len(variables) > 1:
        return None
    join = _unite if joiner == "or" else _intersect
    result = reduce(join, sets)
    if any(reduce(join, sets[:place] + sets[place + 1 :]) == result for place in range(len(sets)) if len(sets) > 1):
        return None
    return RealSet(result.intervals, next(iter(variables), ""))


def _of_union(union: Union) -> RealSet | None:
    result = real_set(union.first)
    for operator, value in union.rest:
        other = real_set(value)
        if result is None or other is None:
            return None
        operation = {"union": _unite, "intersection": _intersect, "minus": _subtract}[operator]
        result = operation(result, other)
    return result


def _of_relation(relation: Relation) -> RealSet | None:
    """Return the set of an inequality, membership or chain with one unknown, such as a < x <= b."""
    if relation.signs == ("∈",):
        name, values = relation.sides
        inner = real_set(values)
        is_name = isinstance(name, Expr) and name.op == "symbol"
        return RealSet(inner.intervals, name.name) if inner and isinstance(name, Expr) and is_name else None
    if len(relation.signs) == 1 and isinstance(relation.sides[0], Expr) and relation.sides[0].op == "abs":
        return _of_distance(relation.sides[0].args[0], relation.signs[0], relation.sides[1])
    result: RealSet | None = None
    for place, sign in enumerate(relation.signs):
        part = _half_line(relation.sides[place], sign, relation.sides[place + 1])
        if part is None or (result and result.variable != part.variable):
            return None
        result = RealSet(_intersect(result, part).intervals, part.variable) if result else part
    return result


def _of_distance(inner: Expr, sign: str, size: Value) -> RealSet | None:
    """Return the set of |x| < b, |x - a| > b and the like."""
    name, shift = inner.args if inner.op == "add" else (inner, number(0))
    if not isinstance(size, Expr) or sign not in _FLIPPED:
        return None
    low, high = (apply("add", apply("negate", shift), end) for end in (apply("negate", size), size))
    if sign in "<≤":
        return _of_relation(Relation((low, name, high), (sign, sign)))
    parts = _half_line(name, _FLIPPED[sign], low), _half_line(name, sign, high)
    return RealSet(_unite(parts[0], parts[1]).intervals, name.name) if parts[0] and parts[1] else None


def _half_line(left: Value, sign: str, right: Value) -> RealSet | None:
    if isinstance(right, Expr) and right.op == "symbol":
        left, right = right, left
        sign = _FLIPPED.get(sign, sign)
    if not (isinstance(left, Expr) and left.op == "symbol" and isinstance(right, Expr)) or right.symbols():
        return None
    value, infinity = numeric.real_value(right), numeric.real_value(apply("infinity"))
    whole = _interval(-infinity, infinity, False, False)
    match sign:
        case "<" | "≤":
            result = _interval(-infinity, value, False, sign == "≤")
        case ">" | "≥":
            result = _interval(value, infinity, sign == "≥", False)
        case "≠":
            result = _subtract(whole, _merged([_point(value)]))
        case "=":
            result = _merged([_point(value)])
        case _:
            return None
    return RealSet(result.intervals, left.name)


def _interval(low: Any, high: Any, has_low: bool, has_high: bool) -> RealSet:
    return _merged([(Bound(low, -1 if has_low else 1), Bound(high, 1 if has_high else -1))])


def _point(value: Any) -> tuple[Bound, Bound]:
    return Bound(value, -1), Bound(value, 1)


def _order(one: Bound, other: Bound) -> int:
    """Return -1, 0 or 1 as a bound is below, at or above another one."""
    if numeric.agree(one.value, other.value, AGREED_BITS):
        return (one.side > other.side) - (one.side < other.side)
    return 1 if numeric.greater(one.value, other.value) else -1


def _merged(intervals: list[tuple[Bound, Bound]]) -> RealSet:
    """Return a set of intervals that may overlap."""
    result: list[tuple[Bound, Bound]] = []
    for low, high in sorted(intervals, key=lambda pair: cmp_to_key(_order)(pair[0])):
        if _order(low, high) >= 0:
            continue
        if result and _order(low, result[-1][1]) <= 0:
            start, end = result.pop()
            result.append((start, end if _order(high, end) <= 0 else high))
        else:
            result.append((low, high))
    return RealSet(tuple(result))


def _unite(one: RealSet, other: RealSet) -> RealSet:
    return _merged([*one.intervals, *other.intervals])


def _intersect(one: RealSet, other: RealSet) -> RealSet:
    order = cmp_to_key(_order)
    return _merged(
        [
            (max(left[0], right[0], key=order), min(left[1], right[1], key=order))
            for left in one.intervals
            for right in other.intervals
        ]
    )


def _subtract(one: RealSet, other: RealSet) -> RealSet:
    infinity = numeric.real_value(apply("infinity"))
    ends = [Bound(-infinity, -1), *(bound for pair in other.intervals for bound in pair), Bound(infinity, 1)]
    return _intersect(one, _merged(list(zip(ends[::2], ends[1::2], strict=True))))
