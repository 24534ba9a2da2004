"""Values of expressions at a point, in bounded time.

A value is exact as long as it is rational and small. A power or factorial that is too large is a floating-point number
whose exponent is unbounded, so its digits are never written out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import floor, gcd, lcm, prod
from typing import Any

import mpmath

from rlsys.tasks.answers.values import Expr, UndecidableError

# Exact numbers have at most this many bits; floating-point numbers at most this precision.
MAX_EXACT_BITS = 24_000
MAX_PRECISION = 8_000
GUARD_BITS = 60
# Bits in which two values must agree.
AGREED_BITS = 160
# A power whose result has a larger binary exponent is not computed.
_MAX_MAGNITUDE = 1 << 60
_MAX_FACTORIAL = 10**12
# The factorial of a large number costs seconds with more bits.
_FACTORIAL_PRECISION = 1200
# Trigonometric functions of larger numbers are not computed.
MAX_EXPONENT_BITS = 140

Number = Any  # Fraction, mpf or mpc

CONTEXT = mpmath.MPContext()  # of its own, so that no other code changes the precision


class UndefinedError(Exception):
    """The expression has no finite value at this point."""


class Evaluator:
    """Values of expressions at one point with the present precision of the context.

    A method with the name of an operation computes it, else the table `_FUNCTIONS`.

    Attributes:
        spread: Largest difference of the binary exponents of two summands. A smaller precision loses a summand.
    """

    def __init__(self, values: Mapping[str, Fraction]) -> None:
        self.values = values
        self.spread = 0

    def value(self, expr: Expr) -> Number:
        if expr.op == "symbol":
            return self.values[expr.name]
        if expr.op == "number":
            return _reduced(expr.value)
        arguments = [self.value(argument) for argument in expr.args]
        if expr.op == "unknown":  # a function that is not known is replaced by an arbitrary one
            place, seed = to_float(arguments[0]), sum(map(ord, expr.name))
            return CONTEXT.sin(place * seed / 7 + 1) + CONTEXT.exp(place / (seed % 5 + 3))
        function: Callable[..., Number] | None = getattr(self, f"_{expr.op}", None) or _FUNCTIONS.get(expr.op)
        if function is None:
            raise UndecidableError(f"the function {expr.op}")
        return function(*arguments)

    def _add(self, left: Number, right: Number) -> Number:
        if _exact(left, right):
            return _reduced(left + right)
        if left == 0 or right == 0:
            return right if left == 0 else left
        left, right = to_float(left), to_float(right)
        total = left + right
        magnitudes = [CONTEXT.mag(one) for one in (left, right)]
        if not all(isinstance(one, int) for one in magnitudes):  # infinities
            return _finite(total)
        self.spread = max(self.spread, abs(magnitudes[0] - magnitudes[1]))
        # What is left of a difference of equal values is rounding.
        if total == 0 or CONTEXT.mag(total) < max(magnitudes) - CONTEXT.prec + GUARD_BITS // 2:
            return Fraction(0)
        return total

    def _multiply(self, left: Number, right: Number) -> Number:
        if _exact(left, right):
            return _reduced(left * right)
        left, right = _finite(left), _finite(right)
        return Fraction(0) if left == 0 or right == 0 else _finite(left * right)

    def _divide(self, left: Number, right: Number) -> Number:
        if right == 0:
            raise UndefinedError
        return _reduced(left / right) if _exact(left, right) else _finite(_finite(left) / _finite(right))

    def _percent(self, value: Number) -> Number:
        return self._divide(value, Fraction(100))

    def _degree(self, value: Number) -> Number:
        return self._multiply(self._divide(value, Fraction(180)), +CONTEXT.pi)

    def _power(self, base: Number, exponent: Number) -> Number:
        left, right = _finite(base), _finite(exponent)
        if base == 0:
            if CONTEXT.re(right) > 0:
                return Fraction(0)
            raise UndefinedError
        is_whole = isinstance(exponent, Fraction) and exponent.denominator == 1
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if base == 1 or (is_whole and abs(exponent) * _bits(base) <= MAX_EXACT_BITS):
                return _reduced(base ** int(exponent))
            if base < 0 and exponent.denominator % 2 and not is_whole:  # real odd roots
                size = self._power(-base, exponent)
                return -size if exponent.numerator % 2 else size
        if CONTEXT.mag(right) > 60 or (abs(CONTEXT.mag(left)) + 1) * int(abs(right) + 1) > _MAX_MAGNITUDE:
            raise UndecidableError("a power that is too large")
        return left ** int(exponent) if is_whole else _finite(CONTEXT.power(left, right))

    def _root(self, value: Number, degree: Number) -> Number:
        return self._power(value, self._divide(Fraction(1), degree))

    def _log(self, value: Number, base: Number = Fraction(10)) -> Number:
        return self._divide(self._ln(value), self._ln(base))

    def _ln(self, value: Number) -> Number:
        if value == 0:
            raise UndefinedError
        return Fraction(0) if value == 1 else CONTEXT.ln(to_float(value))

    def _ceil(self, value: Number) -> Number:
        return -self._floor(-value)

    def _floor(self, value: Number) -> Number:
        if isinstance(value, Fraction):
            return Fraction(floor(value))
        if CONTEXT.mag(value) > CONTEXT.prec - GUARD_BITS:
            raise UndecidableError("the rounding of a number that is too large")
        nearest = CONTEXT.nint(value)
        near = abs(value - nearest) < CONTEXT.mpf(2) ** -AGREED_BITS
        return Fraction(int(nearest) if near else floor(value))

    def _factorial(self, value: Number) -> Number:
        count = _whole(value)
        if count < 0:
            raise UndefinedError
        if count <= 2000:
            return Fraction(int(mpmath.libmp.ifac(count)))
        if count > _MAX_FACTORIAL or CONTEXT.prec > _FACTORIAL_PRECISION:
            raise UndecidableError("a factorial that is too large")
        return CONTEXT.gamma(count + 1)

    def _double_factorial(self, value: Number) -> Number:
        count = _whole(value)
        if not 0 <= count <= 3500:
            raise UndecidableError("a double factorial that is too large")
        return Fraction(prod(range(count, 1, -2)))

    def _binomial(self, above: Number, below: Number) -> Number:
        total, chosen = _whole(above), _whole(below)
        if not 0 <= chosen <= total:
            return Fraction(0)
        parts = self._multiply(*(self._factorial(Fraction(part)) for part in (chosen, total - chosen)))
        return self._divide(self._factorial(Fraction(total)), parts)


def to_float(value: Number) -> Number:
    """Return a value as a floating-point number of the present precision."""
    return CONTEXT.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _exact(*values: Number) -> bool:
    return all(isinstance(value, Fraction) for value in values)


def _reduced(value: Fraction) -> Number:
    """Return an exact number of few bits as it is, any other number as a floating-point number."""
    return to_float(value) if _bits(value) > MAX_EXACT_BITS else value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _finite(value: Number) -> Number:
    result = to_float(value)
    if CONTEXT.isnan(result) or CONTEXT.isinf(result):
        raise UndefinedError
    return result


def _whole(value: Number) -> int:
    if isinstance(value, Fraction) and value.denominator == 1:
        return int(value)
    raise UndefinedError


def _real(value: Number) -> Number:
    if not is_real(value):
        raise UndefinedError
    return value.real


def is_real(value: Number) -> bool:
    """Return whether the imaginary part of a value is only rounding."""
    if not isinstance(value, CONTEXT.mpc):
        return True
    return bool(value.imag == 0 or abs(value.imag) < abs(value) * CONTEXT.mpf(2) ** -AGREED_BITS)


def _elementary(name: str) -> Callable[[Number], Number]:
    """Return a trigonometric or hyperbolic function of the context."""

    def function(argument: Number) -> Number:
        argument = to_float(argument)
        if CONTEXT.mag(argument) > MAX_EXPONENT_BITS:
            raise UndecidableError(f"{name} of a number that is too large")
        try:
            value = getattr(CONTEXT, name)(argument)
        except (ZeroDivisionError, ValueError):
            raise UndefinedError from None
        # sin(pi) is 0 up to rounding.
        return Fraction(0) if value != 0 and CONTEXT.mag(value) < -CONTEXT.prec + GUARD_BITS else value

    return function


_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "pi": lambda: +CONTEXT.pi,
    "e": lambda: +CONTEXT.e,
    "i": lambda: CONTEXT.mpc(0, 1),
    "infinity": lambda: CONTEXT.inf,
    "negate": operator.neg,
    "abs": abs,
    "gcd": lambda *values: Fraction(gcd(*map(_whole, values))),
    "lcm": lambda *values: Fraction(lcm(*map(_whole, values))),
    "max": lambda *values: max(map(_real, values)),
    "min": lambda *values: min(map(_real, values)),
    **{name: _elementary(name) for name in ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth"]},
    **{f"arc{name}": _elementary(f"a{name}") for name in ["sin", "cos", "tan", "cot", "sec", "csc"]},
}
