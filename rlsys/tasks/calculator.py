"""A calculator as environment: `<tool>12*7</tool>` is answered with `<result>84</result>`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from rlsys.interfaces import Reply
from rlsys.types import Problem

TAGS = ("<tool>", "</tool>", "<result>", "</result>")
UNREADABLE = "error"
"""Result of a text that is no expression, divides by 0, or has too large numbers."""

MAX_CHARACTERS = 200
MAX_DIGITS = 30

_CALL = re.compile(r"<tool>((?:(?!</?tool>).)*)</tool>", re.DOTALL)
_OPERATIONS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def reply(problem: Problem, turns: Sequence[str]) -> Reply:
    """Return the result of the last call in the last turn. A turn without a call gets no answer."""
    calls = _CALL.findall(turns[-1]) if turns else []
    return Reply(text=result_node(calculate(calls[-1]))) if calls else Reply()


def call_node(expression: str) -> str:
    """Return the call of the calculator for an expression."""
    return f"<tool>{expression}</tool>"


def result_node(result: str) -> str:
    """Return the text of the environment with a result."""
    return f"<result>{result}</result>"


def calculate(expression: str) -> str:
    """Return the value of an expression of numbers, + - * / and parentheses; `error` for other texts.

    A value that is not whole is a decimal with up to 6 places.
    """
    try:
        if len(expression) > MAX_CHARACTERS:
            raise ValueError("too long")
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return UNREADABLE
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6f}".rstrip("0").rstrip(".")


def _value(node: ast.AST) -> Fraction:
    """Return the exact value of an expression. ValueError: it is no arithmetic, or too large."""
    match node:
        case ast.Constant(value=bool()):
            raise ValueError("no number")
        case ast.Constant(value=int() | float() as number):
            value = Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            value = _OPERATIONS[type(sign)](_value(left), _value(right))
        case _:
            raise ValueError("no arithmetic")
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise ValueError("too large")
    return value
