"""Equations, inequalities, assignments and congruences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from rlsys.tasks.answers.comparing import numeric
from rlsys.tasks.answers.comparing.evaluate import is_real
from rlsys.tasks.answers.comparing.sets import FLIPPED
from rlsys.tasks.answers.values import (
    Congruence,
    Expr,
    Quantity,
    Relation,
    Sequence,
    UndecidableError,
    Value,
    apply,
    formula_of,
    number,
)

# Points at which two equations must have the same ratio.
_MIN_POINTS = 3


@dataclass(frozen=True, slots=True)
class Chain:
    """Equal values with their names, such as "x = 36/2 = 18", and the value that they round to.

    Attributes:
        names: Names that stand for the value.
        exact: The value; None if only a rounded one is given, as in "x ≈ 2.35".
        rounded: The first value after "≈", or None.
    """

    names: frozenset[str]
    exact: Value | None
    rounded: Value | None = None


def chain_of(value: Value, same: Callable[[Value, Value], bool]) -> Chain | None:
    """Return the value that a chain of equations states; None if it states none, or two different ones.

    Args:
        value: a relation, or a value, which is a chain without names.
        same: comparison of two values.
    """
    if not isinstance(value, Relation):
        return Chain(frozenset(), value)
    parts = _parts(value)
    if parts is None:
        return None
    names, values, rounded = parts
    if any(not same(values[-1], other) for other in values[:-1]):
        return None
    exact = values[-1] if values else None
    if isinstance(exact, Expr) and rounded and isinstance(rounded[0], Quantity):  # the unit stands only at the end
        exact = Quantity(exact, rounded[0].unit)
    if any(exact is not None and not _rounds(exact, one) for one in rounded):
        return None
    return Chain(frozenset(names) - {""}, exact, rounded[0] if rounded else None)


def _parts(relation: Relation) -> tuple[list[str], list[Value], list[Value]] | None:
    """Return names, values and rounded values of a chain, or None for other relations."""
    sides, signs = list(relation.sides), relation.signs
    if signs == ("∈",):
        name = _name(sides[0])
        return None if name is None or isinstance(sides[1], Expr) else ([name], sides[1:], [])
    equal = signs.index("≈") if "≈" in signs else len(signs)
    if set(signs[:equal]) - {"="} or set(signs[equal:]) - {"≈"}:
        return None
    exact, rounded = sides[: equal + 1], sides[equal + 1 :]
    values = [side for side in exact if _name(side) is None]
    if not values and not rounded:  # x = y
        exact, values = exact[:-1], exact[-1:]
    names = [name for name in map(_name, exact) if name is not None]
    if (not values and not rounded) or any(isinstance(one, Expr) and one.symbols() & set(names) for one in values):
        return None
    return names, values, rounded


def assigned(value: Value) -> tuple[str, Value] | None:
    """Return name and value of "x = 5", "5 = x" or "f(x) = 2x"; None for others."""
    parts = _parts(value) if isinstance(value, Relation) else None
    if parts is None or (len(parts[0]), len(parts[1]), len(parts[2])) != (1, 1, 0):
        return None
    return parts[0][0], parts[1][0]


def _name(side: Value) -> str | None:
    """Return the name of a lone symbol, a tuple of symbols, or a function of a symbol, such as P(x)."""
    if isinstance(side, Sequence) and side.brackets == "()" and len(side.items) > 1:
        names = [_name(item) or "" for item in side.items]
        return ",".join(names) if all(names) else None
    if not isinstance(side, Expr):
        return None
    if side.op == "symbol":
        return side.name
    if side.op == "unknown" and side.args[0].op == "symbol":
        return f"{side.name}()"
    product = side.op == "multiply" and all(argument.op == "symbol" for argument in side.args)
    if product and side.args[0].name.isupper() and side.args[1].name.islower():
        return f"{side.args[0].name}()"
    return None


def _rounds(exact: Value, rounded: Value) -> bool:
    """Return whether a value, rounded or cut off at its last digit, is another one."""
    if isinstance(exact, Quantity) and isinstance(rounded, Quantity) and exact.unit == rounded.unit:
        exact, rounded = exact.amount, rounded.amount
    if not isinstance(exact, Expr) or not isinstance(rounded, Expr) or exact.symbols():
        return False
    decimal = numeric.decimal_of(rounded, whole_step=Fraction(1))
    if decimal is None:
        return False
    value, step = decimal
    middles = value, value + (step if value > 0 else -step) / 2
    return any(numeric.equal(exact, number(middle), step / 2) for middle in middles)


def named_values(sequence: Sequence) -> tuple[tuple[str, ...], list[Value]]:
    """Return the names of the unknowns of a list, and its values, in the order of several names.

    "n = 2, 3, 4" is a list of three values of n.
    """
    items = list(sequence.items)
    pairs = [assigned(item) for item in items]
    if items and pairs[0] and not any(isinstance(item, Relation) for item in items[1:]):
        return (pairs[0][0],), [pairs[0][1], *items[1:]]
    named = [pair for pair in pairs if pair]
    names = {name for name, _ in named}
    if not items or len(named) < len(items) or 1 < len(names) < len(named):
        return (), items
    return tuple(sorted(names)), [
        value for _, value in (sorted(named, key=lambda pair: pair[0]) if len(names) > 1 else named)
    ]


def same_relation(reference: Relation, answer: Relation) -> bool | None:
    """Compare two relations up to a constant factor; None if they may still be the same set of numbers."""
    if len(reference.sides) != 2 or len(answer.sides) != 2:
        return None
    left, right = _difference(reference), _difference(answer)
    if left is None or right is None:
        return None
    sign, other = reference.signs[0], answer.signs[0]
    if sign in ("=", "≠"):
        return other == sign and _ratio_sign(left, right) is not None
    ratio = _ratio_sign(left, right)
    if ratio is None:
        return None
    return other == (sign if ratio > 0 else FLIPPED.get(sign, sign))


def _difference(relation: Relation) -> Expr | None:
    """Return left minus right side of a relation between expressions."""
    left, right = map(formula_of, relation.sides)
    if left is None or right is None:
        return None
    return apply("add", left, apply("negate", right))


def _ratio_sign(left: Expr, right: Expr) -> int | None:
    """Return the sign of the constant ratio of two expressions, or None if their ratio is not constant."""
    if not left.symbols() or left.symbols() != right.symbols():
        return None
    ratios = []
    for point in numeric.points_of((left, right)):
        (ratio,), bits = numeric.values_of((apply("divide", left, right),), point)
        if ratio is not None and is_real(ratio):
            ratios.append((ratio, bits))
    if len(ratios) < _MIN_POINTS:
        raise UndecidableError("a relation without values")
    first = ratios[0][0]
    if first == 0 or not all(numeric.agree(first, ratio, bits) for ratio, bits in ratios):
        return None
    return 1 if first.real > 0 else -1


def same_residues(reference: Congruence, answer: Congruence) -> bool:
    """Return whether two residue classes are the same."""
    if not numeric.equal(reference.modulus, answer.modulus):
        return False
    quotient = apply("divide", apply("add", reference.residue, apply("negate", answer.residue)), reference.modulus)
    value = numeric.real_value(quotient)
    return isinstance(value, Fraction) and value.denominator == 1
