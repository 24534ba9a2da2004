"""Sums, products, integrals and limits with their ends, and the expression after them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlsys.tasks.answers.values import BOUND, Expr, UnreadableError, apply, symbol

if TYPE_CHECKING:
    from rlsys.tasks.answers.reading.grammar import Grammar

OPERATOR_COMMANDS = {"sum": "sum", "prod": "product", "int": "integral", "lim": "limit"}


def read_operator(grammar: Grammar, name: str) -> Expr:
    """Read a sum, product, integral or limit with its ends, and the product after it."""
    variable, ends = "", {}
    for _ in range(1 if name == "limit" else 2):
        mark = grammar.take().text
        if mark == "_" and name != "integral":
            grammar.expect("{")
            variable = grammar.take().text
            if not (grammar.takes("=") if name != "limit" else grammar.next.text in ("to", "rightarrow")):
                raise grammar.unreadable("expected the start of the variable")
            grammar.place += name == "limit"
            ends[mark] = grammar.enclosed("{")
        elif mark in ("_", "^"):
            ends[mark] = grammar.group()
    if len(ends) != 1 + (name != "limit"):
        raise grammar.unreadable(f"expected the ends of the {name}")
    body = grammar.signed(grammar.term, "+", "-") if name != "integral" else None
    if body is None:
        body, variable = _integrand(grammar)
    return Expr(op=name, args=(_bound(body, variable), *(ends[mark] for mark in sorted(ends, reverse=True))))


def _integrand(grammar: Grammar) -> tuple[Expr, str]:
    """Read a sum up to dx, and return it with the name of x."""
    places = range(grammar.place, len(grammar.tokens) - 1)
    kinds = [(grammar.tokens[place].text, grammar.tokens[place + 1].kind) for place in places]
    if ("d", "symbol") not in kinds:
        raise grammar.unreadable("expected the variable of the integral")
    grammar.differential = places[kinds.index(("d", "symbol"))]
    variable = grammar.tokens[grammar.differential + 1].text
    body = grammar.signed(grammar.term, "+", "-")
    while grammar.differential >= grammar.place and grammar.is_sign("+", "-"):
        is_minus = grammar.take().text == "-"
        body = apply("add", body, apply("negate", grammar.term()) if is_minus else grammar.term())
    if grammar.differential >= grammar.place:
        raise grammar.unreadable("expected the variable of the integral")
    return body, variable


def _bound(body: Expr, variable: str) -> Expr:
    """Return an expression with a variable replaced by the one of all operators."""
    if body.op in OPERATOR_COMMANDS.values() or (body.op == "symbol" and variable in body.name.partition("_")[2]):
        raise UnreadableError("a sum in a sum, or an index with its variable")
    if variable in (body.name if body.op == "symbol" else body.op,):
        return symbol(BOUND)
    return replace(body, args=tuple(_bound(argument, variable) for argument in body.args))
