"""Equality of expressions by their values: exact where possible, else with enough digits.

Symbols get several values. Two expressions are equal if they have the same value at all points.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction

from rlsys.tasks.answers.comparing.evaluate import (
    AGREED_BITS,
    CONTEXT,
    GUARD_BITS,
    MAX_PRECISION,
    Number,
    UndefinedError,
    is_real,
    to_float,
)
from rlsys.tasks.answers.comparing.operators import NUMERIC_BITS, OperatorEvaluator
from rlsys.tasks.answers.values import OPERATORS, Expr, UndecidableError, number

_PRECISIONS = (140, 300, 800, 2000, MAX_PRECISION)
# Numbers with more bits are counted, because they may be many digits of an irrational number.
_SMALL_BITS = 20
_POINTS = 6
_MAX_DECIMAL_EXPONENT = 10_000


def values_of(expressions: Sequence[Expr], point: Mapping[str, Fraction]) -> tuple[list[Number | None], int]:
    """Return the values of expressions at a point, None where one is undefined, and their number of correct bits.

    The precision grows until two precisions agree and no summand is smaller than the rounding of another. It is larger
    than the numbers that the expressions write out, so the digits of an irrational number are never equal to it.

    Raises:
        UndecidableError: the largest precision is not enough, or a number is too large.
    """
    is_numeric = any(node.op in OPERATORS for expr in expressions for node in expr.walk())
    digits = sum(map(_digits, expressions))
    agreed = max(NUMERIC_BITS if is_numeric else AGREED_BITS, digits + GUARD_BITS if digits else 0)
    for precision in _PRECISIONS:
        if agreed + GUARD_BITS > precision:
            continue
        rough, spread = _evaluate(expressions, point, precision)
        bits = spread + agreed
        if bits + GUARD_BITS > precision:
            continue
        fine, _ = _evaluate(expressions, point, precision + GUARD_BITS)
        pairs = zip(rough, fine, strict=True)
        if all(one is other is None or (None not in (one, other) and agree(one, other, bits)) for one, other in pairs):
            return fine, bits
    raise UndecidableError(f"a value that needs more than {_PRECISIONS[-1]} bits")


def _digits(expr: Expr) -> int:
    """Return the number of bits of the long numbers of an expression."""
    bits = (node.value.numerator.bit_length() + node.value.denominator.bit_length() for node in expr.walk())
    return sum(count for count in bits if count > _SMALL_BITS)


def _evaluate(
    expressions: Sequence[Expr], point: Mapping[str, Fraction], precision: int
) -> tuple[list[Number | None], int]:
    evaluator = OperatorEvaluator(point)
    values: list[Number | None] = []
    with CONTEXT.workprec(precision):
        for expr in expressions:
            try:
                values.append(evaluator.value(expr))
            except UndefinedError:
                values.append(None)
    return values, evaluator.spread


def agree(left: Number, right: Number, bits: int, tolerance: Fraction = Fraction(0)) -> bool:
    """Return whether two values agree in a number of bits, or up to an absolute tolerance."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return abs(left - right) <= tolerance
    with CONTEXT.workprec(bits + GUARD_BITS):
        left, right = to_float(left), to_float(right)
        if CONTEXT.isinf(left) or CONTEXT.isinf(right):
            return bool(left == right)
        limit = max(abs(left), abs(right)) * CONTEXT.mpf(2) ** -bits
        return bool(abs(left - right) <= max(limit, to_float(tolerance)))


def _counts(expr: Expr) -> bool:
    """Return whether the symbols of an expression must be whole numbers, as in n! or (-1)^n."""
    for node in expr.walk():
        if node.op in ("factorial", "double_factorial", "binomial", "gcd", "lcm") and node.symbols():
            return True
        if node.op in ("sum", "product") and any(end.symbols() for end in node.args[1:]):
            return True
        if node.op == "power" and node.args[0].op == "negate" and node.args[1].symbols():
            return True
    return False


def _branches(expr: Expr) -> bool:
    """Return whether an expression can change its form far from zero, as |x + 5| does."""
    roots = [node for node in expr.walk() if node.op == "root" or (node.op == "power" and not node.args[1].symbols())]
    return any(node.op in ("abs", "max", "min", "floor", "ceil") for node in expr.walk()) or any(
        node.args[0].symbols() and (node.op == "root" or node.args[1].op != "number") for node in roots
    )


def points_of(expressions: Sequence[Expr]) -> list[dict[str, Fraction]]:
    """Return values of all symbols: positive ones, then ones of both signs unless they must be whole numbers.

    Numbers far from zero follow where an expression has branches.
    """
    names = sorted(set().union(*(expr.symbols() for expr in expressions)))
    if not names:
        return [{}]
    rng = random.Random(" ".join(names))
    if any(map(_counts, expressions)):
        return [{name: Fraction(rng.randint(1, 9 + row)) for name in names} for row in range(2 * _POINTS)]
    rows = [[Fraction(rng.randint(11, 400), 97) for _ in names] for _ in range(_POINTS)]
    for place in range(len(names)):
        # The second half has every other symbol negative, then the others, then all.
        rows[3 + place % 2][place] *= -1
        rows[5][place] *= -1
    if any(map(_branches, expressions)):
        rows += [[Fraction(sign * rng.randint(20_000, 90_000), 97) for _ in names] for sign in (1, -1)]
    return [dict(zip(names, row, strict=True)) for row in rows]


def equal(left: Expr, right: Expr, tolerance: Fraction = Fraction(0)) -> bool:
    """Return whether two expressions have the same values.

    Symbols are real. A point counts where both sides are real, or where all symbols are positive.

    Args:
        tolerance: Largest difference of two numbers.

    Raises:
        UndecidableError: a value is too large or undefined.
    """
    if left == right:
        return True
    compared, points = 0, points_of((left, right))
    # n! / (n - k)! has no value where a binomial coefficient is 0.
    is_partial = any(map(_counts, (left, right)))
    for point in points:
        (one, other), bits = values_of((left, right), point)
        if one is None or other is None:
            if one is not other and not is_partial:
                return False
            continue
        real = is_real(one), is_real(other)
        if not all(real) and min(point.values(), default=1) < 0:
            if any(real):
                return False
            continue
        if not agree(one, other, bits, tolerance):
            return False
        compared += 1
    if compared < (len(points) // 3 if is_partial else 1):
        raise UndecidableError("an expression without a value")
    return True


def real_value(expr: Expr) -> Number:
    """Return the value of a real constant, for comparisons of size."""
    if expr.symbols():
        raise UndecidableError("a symbol where a number is expected")
    (value,), _ = values_of((expr,), {})
    if value is None or not is_real(value):
        raise UndecidableError("a value that is not real")
    return value.real


def decimal_of(expr: Expr, whole_step: Fraction | None = None) -> tuple[Fraction, Fraction] | None:
    """Return value and last digit's unit of a decimal such as -1.25, 12.5% or 1.2 * 10^-5, or None.

    Args:
        whole_step: unit of the last digit of a whole number, which is no decimal without it.
    """
    match expr.op:
        case "number":
            step = whole_step if expr.step is None else expr.step
            return None if step is None else (expr.value, step)
        case "negate" | "percent":
            inner = decimal_of(expr.args[0], whole_step)
            factor = Fraction(-1) if expr.op == "negate" else Fraction(1, 100)
            return (inner[0] * factor, inner[1] * abs(factor)) if inner else None
        case "multiply":
            inner, power = decimal_of(expr.args[0], whole_step), expr.args[1]
            if inner is None or power.op != "power" or power.args[0] != number(10) or power.args[1].symbols():
                return None
            exponent = real_value(power.args[1])
            if not isinstance(exponent, Fraction) or exponent.denominator > 1 or abs(exponent) > _MAX_DECIMAL_EXPONENT:
                return None
            return inner[0] * Fraction(10) ** int(exponent), inner[1] * Fraction(10) ** int(exponent)
    return None


def greater(left: Number, right: Number) -> bool:
    """Return whether one real value is larger than another one."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left > right
    with CONTEXT.workprec(_PRECISIONS[1]):
        return bool(to_float(left) > to_float(right))
