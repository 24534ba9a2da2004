"""Values of expressions at a point, in bounded time.

A value is exact as long as it is rational and small. A power or factorial that is too large is a floating-point number
whose exponent is unbounded, so its digits are never written out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import floor, gcd, lcm
from typing import Any

import mpmath

from rlsys.tasks.answers.expressions import Expr, UndecidableError

# Exact numbers have at most this many bits; floating-point numbers at most this precision.
MAX_EXACT_BITS = 24_000
MAX_PRECISION = 8_000
GUARD_BITS = 60
# Bits in which two values must agree.
AGREED_BITS = 80
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

    Attributes:
        spread: Largest difference of the binary exponents of two summands. A smaller precision loses a summand.
    """

    def __init__(self, values: Mapping[str, Fraction]) -> None:
        self.values = values
        self.spread = 0

    def value(self, expr: Expr) -> Number:
        match expr.op:
            case "number":
                return self._reduced(expr.value)
            case "symbol":
                return self.values[expr.name]
            case "multiply" | "divide" | "add" | "power":
                left, right = (self.value(argument) for argument in expr.args)
                operation = {"multiply": self._multiply, "divide": self._divide, "add": self._add, "power": self._power}
                return operation[expr.op](left, right)
            case "unknown":  # a function that is not known is replaced by an arbitrary one
                place = self._float(self.value(expr.args[0]))
                seed = sum(map(ord, expr.name))
                return CONTEXT.sin(place * seed / 7 + 1) + CONTEXT.exp(place / (seed % 5 + 3))
            case "plus_minus" | "minus_plus":
                raise UndecidableError("a plus-minus sign inside an expression")
        function: Callable[..., Number] | None = _SIMPLE.get(expr.op) or getattr(self, f"_{expr.op}", None)
        arguments = [self.value(argument) for argument in expr.args]
        return function(*arguments) if function else self._elementary(expr.op, arguments)

    def _reduced(self, value: Number) -> Number:
        """Return an exact number of few bits as it is, any other number as a floating-point number."""
        if isinstance(value, Fraction) and _bits(value) > MAX_EXACT_BITS:
            return self._float(value)
        return value

    def _float(self, value: Number) -> Number:
        if isinstance(value, Fraction):
            return CONTEXT.mpf(value.numerator) / value.denominator
        return value

    def _add(self, left: Number, right: Number) -> Number:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return self._reduced(left + right)
        if left == 0 or right == 0:
            return right if left == 0 else left
        left, right = self._float(left), self._float(right)
        magnitudes = [CONTEXT.mag(one) for one in (left, right)]
        if not all(isinstance(one, int) for one in magnitudes):  # infinities
            total = left + right
            return self._finite(total)
        self.spread = max(self.spread, abs(magnitudes[0] - magnitudes[1]))
        total = left + right
        # What is left of a difference of equal values is rounding.
        if total == 0 or CONTEXT.mag(total) < max(magnitudes) - CONTEXT.prec + GUARD_BITS // 2:
            return Fraction(0)
        return total

    def _finite(self, value: Number) -> Number:
        if CONTEXT.isnan(value) or CONTEXT.isinf(value):
            raise UndefinedError
        return value

    def _multiply(self, left: Number, right: Number) -> Number:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return self._reduced(left * right)
        left, right = self._finite(self._float(left)), self._finite(self._float(right))
        return Fraction(0) if left == 0 or right == 0 else self._finite(left * right)

    def _divide(self, left: Number, right: Number) -> Number:
        if right == 0:
            raise UndefinedError
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return self._reduced(left / right)
        return self._finite(self._finite(self._float(left)) / self._finite(self._float(right)))

    def _percent(self, value: Number) -> Number:
        return self._divide(value, Fraction(100))

    def _degree(self, value: Number) -> Number:
        return self._multiply(self._divide(value, Fraction(180)), +CONTEXT.pi)

    def _power(self, base: Number, exponent: Number) -> Number:
        if CONTEXT.isinf(self._float(base)) or CONTEXT.isinf(self._float(exponent)):
            raise UndefinedError
        if exponent == 0 and base != 0:
            return Fraction(1)
        if base == 0:
            if CONTEXT.re(self._float(exponent)) > 0:
                return Fraction(0)
            raise UndefinedError
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if base == 1:
                return Fraction(1)
            exact = _exact_power(base, exponent)
            if exact is not None:
                return self._reduced(exact)
            if base < 0 and exponent.denominator % 2 and exponent.denominator > 1:  # real odd roots
                size = self._power(-base, exponent)
                return -size if exponent.numerator % 2 else size
        left, right = self._float(base), self._float(exponent)
        self._check_size(abs(CONTEXT.mag(left)) + 1, right)
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return left ** int(exponent)
        return self._finite(CONTEXT.power(left, right))

    def _check_size(self, bits: int, exponent: Number) -> None:
        size = abs(exponent)
        if CONTEXT.isinf(size):
            return
        if CONTEXT.mag(size) > 60 or bits * int(size + 1) > _MAX_MAGNITUDE:
            raise UndecidableError("a power that is too large")

    def _root(self, value: Number, degree: Number) -> Number:
        if degree == 0:
            raise UndefinedError
        return self._power(value, self._divide(Fraction(1), degree))

    def _log(self, value: Number, base: Number = Fraction(10)) -> Number:
        if value == 0 or base in (0, 1):
            raise UndefinedError
        if isinstance(value, Fraction) and isinstance(base, Fraction) and base > 1 and value > 0:
            guess = round(float(mpmath.log(value.numerator) - mpmath.log(value.denominator)) / float(mpmath.log(base)))
            if _exact_power(base, Fraction(guess)) == value:
                return Fraction(guess)
        return self._divide(CONTEXT.ln(self._float(value)), CONTEXT.ln(self._float(base)))

    def _ln(self, value: Number) -> Number:
        if value == 0:
            raise UndefinedError
        return Fraction(0) if value == 1 else CONTEXT.ln(self._float(value))

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
        result = 1
        for factor in range(count, 1, -2):
            result *= factor
        return Fraction(result)

    def _binomial(self, above: Number, below: Number) -> Number:
        total, chosen = _whole(above), _whole(below)
        if chosen < 0 or chosen > total:
            return Fraction(0)
        parts = self._factorial(Fraction(chosen)), self._factorial(Fraction(total - chosen))
        return self._divide(self._divide(self._factorial(Fraction(total)), parts[0]), parts[1])

    def _elementary(self, name: str, arguments: list[Number]) -> Number:
        """Return the value of a trigonometric or hyperbolic function."""
        function = _ELEMENTARY.get(name)
        if function is None:
            raise UndecidableError(f"the function {name}")
        (argument,) = map(self._float, arguments)
        if CONTEXT.mag(argument) > MAX_EXPONENT_BITS:
            raise UndecidableError(f"{name} of a number that is too large")
        try:
            value = getattr(CONTEXT, function)(argument)
        except (ZeroDivisionError, ValueError):
            raise UndefinedError from None
        if value != 0 and CONTEXT.mag(value) < -CONTEXT.prec + GUARD_BITS:
            return Fraction(0)  # sin(pi) up to rounding
        return value


_ELEMENTARY = {
    **{name: name for name in ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth"]},
    **{f"arc{name}": f"a{name}" for name in ["sin", "cos", "tan", "cot", "sec", "csc"]},
}


_SIMPLE: dict[str, Callable[..., Number]] = {
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
}


def _real(value: Number) -> Number:
    if not is_real(value):
        raise UndefinedError
    return value.real


def _whole(value: Number) -> int:
    if isinstance(value, Fraction) and value.denominator == 1:
        return int(value)
    raise UndefinedError


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """Return a rational power of a rational number if it is rational and small, else None."""
    if abs(exponent) * _bits(base) > MAX_EXACT_BITS:
        return None
    if exponent.denominator == 1:
        return base ** int(exponent)
    if exponent.denominator > 64 or base < 0:
        return None
    roots = [_integer_root(part, exponent.denominator) for part in (base.numerator, base.denominator)]
    if None in roots:
        return None
    return Fraction(roots[0] or 0, roots[1] or 1) ** exponent.numerator


def _integer_root(value: int, degree: int) -> int | None:
    """Return the exact root of an integer, or None if it is irrational."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**degree < value:
            low = middle + 1
        else:
            high = middle
    return low if low**degree == value else None


def is_real(value: Number) -> bool:
    """Return whether the imaginary part of a value is only rounding."""
    if not isinstance(value, CONTEXT.mpc):
        return True
    return bool(value.imag == 0 or abs(value.imag) < abs(value) * CONTEXT.mpf(2) ** -AGREED_BITS)
