"""Sets of real numbers: intervals, unions, inequalities of one unknown.

Two sets are equal if they have the same of their ends, and of one number between two ends that follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cmp_to_key
from itertools import pairwise

from rlsys.tasks.answers.comparing import numeric
from rlsys.tasks.answers.comparing.evaluate import AGREED_BITS, CONTEXT, MAX_PRECISION, Number, to_float
from rlsys.tasks.answers.values import Expr, Relation, Sequence, UndecidableError, Union, Value, apply, number

FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
INTERVALS = ("()", "[)", "(]", "[]")
_COMPARED: dict[str, Callable[[int], bool]] = {
    "<": lambda order: order < 0,
    ">": lambda order: order > 0,
    "≤": lambda order: order <= 0,
    "≥": lambda order: order >= 0,
    "=": lambda order: order == 0,
    "≠": lambda order: order != 0,
}


@dataclass(frozen=True, slots=True)
class RealSet:
    """A set of real numbers.

    Attributes:
        ends: Numbers at which the membership may change.
        has: Membership of a number.
        variable: Name of the unknown of an inequality, else "".
    """

    ends: tuple[Number, ...]
    has: Callable[[Number], bool]
    variable: str = ""


def same_set(reference: Value, answer: Value) -> bool:
    """Return whether two values describe the same set of real numbers.

    Raises:
        UndecidableError: an end is not a real number.
    """
    one, other = real_set(reference), real_set(answer)
    return one is not None and other is not None and _equal(one, other)


def real_set(value: Value) -> RealSet | None:
    """Return the set of real numbers that a value describes, or None."""
    if isinstance(value, Relation):
        return _of_relation(value)
    if isinstance(value, Union):
        sets = [real_set(one) for one in (value.first, *(item for _, item in value.rest))]
        return _joined(["", *(operator for operator, _ in value.rest)], sets)
    if not isinstance(value, Sequence):
        return None
    if value.brackets == "" and value.items:
        return _without_idle(value.joiner, [real_set(item) for item in value.items])
    ends = [numeric.real_value(item) for item in value.items if isinstance(item, Expr)]
    if len(ends) != len(value.items):
        return None
    if value.brackets == "{}":
        return RealSet(tuple(ends), lambda x: any(_order(x, end) == 0 for end in ends))
    if len(ends) != 2 or value.brackets not in INTERVALS or _order(*ends) > 0:
        return None  # a tuple
    above, below = _line(">≥"[value.brackets[0] == "["], ends[0]), _line("<≤"[value.brackets[1] == "]"], ends[1])
    return _joined(["", "and"], [above, below])


def _order(one: Number, other: Number) -> int:
    """Return -1, 0 or 1 as a number is below, equal to or above another one."""
    exact = [number for number in (one, other) if isinstance(number, Fraction)]
    if len(exact) == 1 and exact[0].denominator.bit_length() > AGREED_BITS // 4:
        raise UndecidableError("a long decimal as an end beside an irrational one")
    if numeric.agree(one, other, AGREED_BITS):
        return 0
    return 1 if numeric.greater(one, other) else -1


def _equal(one: RealSet, other: RealSet) -> bool:
    if one.variable and other.variable and one.variable != other.variable:
        return False
    finite = [end for end in one.ends + other.ends if not CONTEXT.isinf(to_float(end))]
    ends = sorted(finite, key=cmp_to_key(_order)) or [Fraction(0)]
    with CONTEXT.workprec(2 * MAX_PRECISION):
        between = [(low + high) / 2 for low, high in pairwise(map(to_float, ends))]
        probes = [*ends, *between, to_float(ends[0]) - 1, to_float(ends[-1]) + 1]
    return all(one.has(probe) == other.has(probe) for probe in probes)


def _line(sign: str, end: Number, variable: str = "") -> RealSet:
    """Return the numbers x of "x < end", or of another sign."""
    compared = _COMPARED[sign]
    return RealSet((end,), lambda x: compared(_order(x, end)), variable)


def _joined(operators: list[str], sets: list[RealSet | None]) -> RealSet | None:
    """Join sets from left to right, each with the operator before it; the unknown must be the same."""
    known = [one for one in sets if one is not None]
    variables = {one.variable for one in known if one.variable}
    if len(known) < len(sets) or len(variables) > 1:
        return None

    def has(x: Number) -> bool:
        result = known[0].has(x)
        for operator, one in zip(operators[1:], known[1:], strict=True):
            inside = one.has(x)
            result = {"union": result or inside, "or": result or inside, "minus": result and not inside}.get(
                operator, result and inside
            )
        return result

    ends = tuple(end for one in known for end in one.ends)
    return RealSet(ends, has, next(iter(variables), ""))


def _without_idle(joiner: str, sets: list[RealSet | None]) -> RealSet | None:
    """Join sets by "or", else by "and"; None if one item changes nothing."""
    operators = [joiner] * len(sets)
    result = _joined(operators, sets)
    for place in range(len(sets) if result and len(sets) > 1 else 0):
        rest = _joined(operators[1:], sets[:place] + sets[place + 1 :])
        if result and rest and _equal(rest, result):
            return None
    return result


def _of_relation(relation: Relation) -> RealSet | None:
    """Return the set of an inequality, membership or chain with one unknown, such as a < x <= b."""
    name, *others = relation.sides
    if relation.signs == ("∈",):
        inner = real_set(others[0])
        is_name = isinstance(name, Expr) and name.op == "symbol"
        return RealSet(inner.ends, inner.has, name.name) if inner and isinstance(name, Expr) and is_name else None
    if len(others) == 1 and isinstance(name, Expr) and name.op == "abs":
        return _of_distance(name.args[0], relation.signs[0], others[0])
    parts = [_half_line(*side) for side in zip(relation.sides, relation.signs, others, strict=False)]
    return _joined(["and"] * len(parts), parts)


def _of_distance(inner: Expr, sign: str, size: Value) -> RealSet | None:
    """Return the set of |x| < b, |x - a| > b and the like."""
    name, shift = inner.args if inner.op == "add" else (inner, number(0))
    if not isinstance(size, Expr) or sign not in FLIPPED:
        return None
    low, high = (apply("add", apply("negate", shift), end) for end in (apply("negate", size), size))
    parts = [_half_line(name, FLIPPED[sign], low), _half_line(name, sign, high)]
    return _joined(["", "and" if sign in "<≤" else "or"], parts)


def _half_line(left: Value, sign: str, right: Value) -> RealSet | None:
    if isinstance(right, Expr) and right.op == "symbol":
        left, right = right, left
        sign = FLIPPED.get(sign, sign)
    if not (isinstance(left, Expr) and left.op == "symbol" and isinstance(right, Expr)) or right.symbols():
        return None
    return _line(sign, numeric.real_value(right), left.name) if sign in _COMPARED else None
