"""Values of sums, products, integrals and limits, with a bound on the work before it begins.

A finite sum or product is computed term by term. mpmath finds the value of a series, an integral or a limit; it must be
sure of its digits.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

from rlsys.tasks.answers.comparing.evaluate import CONTEXT, Evaluator, Number, UndefinedError, to_float
from rlsys.tasks.answers.values import BOUND, OPERATORS, Expr, UndecidableError

# Terms times nodes of the expression.
MAX_STEPS = 10_000
# Nodes of a series, an integral or a limit, which is computed at some hundred places.
MAX_NODES = 50
# An exact sum of more bits goes on as a floating-point number.
MAX_SUM_BITS = 4000
# Terms of a series, or values before a limit, that mpmath may ask for. Both numbers must give the same value.
MAX_TERMS = (100, 40)
# The terms of a series are near to 0 at this place, and values are near to their limit.
_FAR_PLACE, _NEAR = 10_000, 0.1
# Bits in which the values of an integral must agree.
NUMERIC_BITS = 60
MAX_NUMERIC_PRECISION = 400
# Binary exponent of a place that is far out.
_FAR_BITS = 20


class OperatorEvaluator(Evaluator):
    """Evaluator of expressions that may have a sum, product, integral or limit."""

    def value(self, expr: Expr) -> Number:
        if expr.op not in OPERATORS:
            return super().value(expr)
        value = self.computed(expr) if expr.symbols() else _constant(expr, CONTEXT.prec)
        if isinstance(value, Exception):
            raise value
        return value

    def computed(self, expr: Expr) -> Number:
        """Return the value of a sum, product, integral or limit."""
        if expr.op in ("sum", "product") and expr.args[2].op != "infinity":
            return self._total(expr)
        if sum(1 for _ in expr.walk()) > MAX_NODES:
            raise UndecidableError(f"a series, an integral or a limit of more than {MAX_NODES} parts")
        if expr.symbols():
            raise UndecidableError("a series, an integral or a limit with a symbol")
        if CONTEXT.prec > MAX_NUMERIC_PRECISION:
            raise UndecidableError("a series, an integral or a limit that needs more digits")
        return _numeric(expr)

    def _total(self, expr: Expr) -> Number:
        """Return a sum or product of terms, one by one."""
        body, low, high = expr.args[0], *map(self.value, expr.args[1:])
        if not all(isinstance(end, Fraction) and end.denominator == 1 for end in (low, high)):
            raise UndefinedError
        if (high - low + 1) * sum(1 for _ in body.walk()) > MAX_STEPS:
            raise UndecidableError("a sum or product of too many terms")
        join = self._add if expr.op == "sum" else self._multiply
        total: Number = Fraction(expr.op == "product")
        for place in range(int(low), int(high) + 1):
            total = join(total, OperatorEvaluator({**self.values, BOUND: Fraction(place)}).value(body))
            if isinstance(total, Fraction) and total.denominator.bit_length() > MAX_SUM_BITS:
                total = to_float(total)
        return total


@lru_cache(maxsize=256)
def _constant(expr: Expr, precision: int) -> Number | UndecidableError | UndefinedError:
    """Return the value of a sum, product, integral or limit without other symbols, or the reason why it has none."""
    with CONTEXT.workprec(precision):
        try:
            return OperatorEvaluator({}).computed(expr)
        except (UndecidableError, UndefinedError) as error:
            return error


def _numeric(expr: Expr) -> Number:
    body, *ends = expr.args

    def at(place: Any) -> Any:
        is_whole = CONTEXT.mag(place) < _FAR_BITS and place == int(place)
        whole = Fraction(int(place)) if is_whole else place
        try:
            return to_float(OperatorEvaluator({BOUND: whole}).value(body))
        except UndecidableError:  # exp(-x) far out is 0 if it is nothing nearer
            nearer = CONTEXT.sign(place) * 2 ** (_FAR_BITS - 1)
            if CONTEXT.mag(place) < _FAR_BITS or abs(at(nearer)) > CONTEXT.mpf(2) ** -CONTEXT.prec:
                raise
            return CONTEXT.zero

    low, *high = (to_float(OperatorEvaluator({}).value(end)) for end in ends)
    try:
        if expr.op == "integral":
            return _agreed(*_with_error(CONTEXT.quad(at, [low, *high], error=True)))
        if expr.op == "sum":
            return _series(at, low)
        if expr.op == "limit":
            return _limit(at, low)
    except (UndefinedError, ZeroDivisionError, ValueError, OverflowError):
        pass
    raise UndecidableError(f"{expr.op}: no value")


def _series(at: Callable[[Any], Any], low: Any) -> Any:
    """Return the sum of an infinite series, whose terms must become small."""
    if abs(at(low + _FAR_PLACE)) > _NEAR:
        raise UndecidableError("a series that diverges")
    return _sure(partial(CONTEXT.nsum, at, [low, CONTEXT.inf], method="r+s"))


def _limit(at: Callable[[Any], Any], point: Any) -> Any:
    """Return a limit that is the same from both sides, and near to a value at some distance."""
    is_far = bool(CONTEXT.isinf(point))
    values = [_sure(partial(CONTEXT.limit, at, point, direction=side)) for side in ((1,) if is_far else (1, -1))]
    sample = at(_FAR_PLACE * CONTEXT.sign(point) if is_far else point + CONTEXT.one / _FAR_PLACE)
    if abs(sample - values[0]) > _NEAR * max(1, abs(values[0])):
        raise UndecidableError("a limit that may not exist")
    return _agreed(values[0], values[-1])


def _sure(value_of: Callable[..., Any]) -> Any:
    """Return a value that is the same with fewer terms."""
    return _agreed(*(value_of(maxterms=terms) for terms in MAX_TERMS))


def _with_error(result: tuple[Any, Any]) -> tuple[Any, Any]:
    return result[0], result[0] + result[1]


def _agreed(value: Any, other: Any) -> Any:
    if abs(value - other) > CONTEXT.mpf(2) ** -NUMERIC_BITS * max(1, abs(value)):
        raise UndecidableError("a series, an integral or a limit whose value is uncertain")
    return value
