"""Plus-minus signs: an expression with them stands for the list of its values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from rlsys.tasks.answers.expressions import Expr, Relation, Sequence, UndecidableError, Value, apply
from rlsys.tasks.answers.relations import assigned


def spread_signs(value: Value) -> Value:
    """Return an expression with plus-minus signs as the list of its values."""
    if isinstance(value, Expr):
        values = _alternatives(value)
        return value if len(values) == 1 else Sequence("", tuple(values), "or")
    if isinstance(value, Relation) and any(
        isinstance(side, Expr) and len(_alternatives(side)) > 1 for side in value.sides
    ):
        name = assigned(value)
        return spread_signs(name[1]) if name else value
    if isinstance(value, Sequence) and value.brackets in ("", "{}"):
        items: list[Value] = []
        for item in value.items:
            spread = spread_signs(item)
            items.extend(spread.items if spread != item and isinstance(spread, Sequence) else [spread])
        return Sequence(value.brackets, tuple(items), value.joiner)
    return value


def _alternatives(expr: Expr) -> list[Expr]:
    """Return the expressions for all choices of signs. Signs are coupled if a minus-plus sign is among them."""
    nodes = [node.op for node in expr.walk() if node.op in ("plus_minus", "minus_plus")]
    if not nodes:
        return [expr]
    if len(nodes) > 4:
        raise UndecidableError("more than 4 plus-minus signs")
    coupled = "minus_plus" in nodes
    rows = [(first,) * len(nodes) for first in (1, -1)] if coupled else list(product((1, -1), repeat=len(nodes)))
    return [_chosen(expr, iter(row)) for row in rows]


def _chosen(expr: Expr, signs: Iterator[int]) -> Expr:
    if expr.op in ("plus_minus", "minus_plus"):
        sign = next(signs) * (1 if expr.op == "plus_minus" else -1)
        left, right = (_chosen(argument, signs) for argument in expr.args)
        return apply("add", left, right if sign > 0 else apply("negate", right))
    if not expr.args:
        return expr
    return Expr(op=expr.op, args=tuple(_chosen(argument, signs) for argument in expr.args), name=expr.name)
