"""Plus-minus signs: an expression with them stands for the list of its values."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import product

from rlsys.tasks.answers.expressions import Expr, Relation, Sequence, UndecidableError, Value, apply
from rlsys.tasks.answers.relations import assigned


def spread_signs(value: Value) -> Value:
    """Return an expression or a tuple with plus-minus signs as the list of its values."""
    if isinstance(value, Expr):
        values = _alternatives((value,))
        return value if len(values) == 1 else Sequence("", tuple(row[0] for row in values), "or")
    if isinstance(value, Relation) and any(isinstance(side, Expr) and _signs((side,)) for side in value.sides):
        name = assigned(value)
        return spread_signs(name[1]) if name else value
    if isinstance(value, Sequence) and value.brackets in ("", "{}"):
        items: list[Value] = []
        for item in value.items:
            spread = spread_signs(item)
            items.extend(spread.items if spread != item and isinstance(spread, Sequence) else [spread])
        return Sequence(value.brackets, tuple(items), value.joiner)
    if isinstance(value, Sequence) and value.brackets == "()":
        parts = tuple(item for item in value.items if isinstance(item, Expr))
        signs = _signs(parts)
        if len(parts) == len(value.items) and (len(signs) == 1 or "minus_plus" in signs):
            return Sequence("", tuple(Sequence("()", row) for row in _alternatives(parts)))
    return value


def _signs(parts: Items[Expr]) -> list[str]:
    return [node.op for part in parts for node in part.walk() if node.op in ("plus_minus", "minus_plus")]


def _alternatives(parts: Items[Expr]) -> list[tuple[Expr, ...]]:
    """Return the expressions for all choices of signs. Signs are coupled if a minus-plus sign is among them."""
    count = len(_signs(parts))
    if count > 4:
        raise UndecidableError("more than 4 plus-minus signs")
    coupled = "minus_plus" in _signs(parts)
    rows = [(sign,) * count for sign in (1, -1)] if coupled else product((1, -1), repeat=count)
    return [tuple(_chosen(part, signs) for part in parts) for signs in map(iter, rows)]


def _chosen(expr: Expr, signs: Iterator[int]) -> Expr:
    if expr.op in ("plus_minus", "minus_plus"):
        sign = next(signs) * (1 if expr.op == "plus_minus" else -1)
        left, right = (_chosen(argument, signs) for argument in expr.args)
        return apply("add", left, right if sign > 0 else apply("negate", right))
    if not expr.args:
        return expr
    return Expr(op=expr.op, args=tuple(_chosen(argument, signs) for argument in expr.args), name=expr.name)
