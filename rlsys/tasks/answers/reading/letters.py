"""Letters that may be variables or units: "5 m" is an amount with a unit, and a product.

The grammar reads a product. It is also an amount if only a number stands before the letters of the unit.
"""

from __future__ import annotations

from rlsys.tasks.answers.reading.units import SYMBOL_UNITS, read_unit
from rlsys.tasks.answers.values import Expr, Quantity, apply, number

_SQUARE_AND_CUBE = (number(2), number(3))


def amount_of(product: Expr, *, spaced: bool) -> Quantity | None:
    """Return a number times letters of units as an amount with a unit; None for other products.

    Args:
        product: an expression, such as 5*m/s.
        spaced: A space must stand before the unit.
    """
    amount, text, first = _positive(product), "", product
    while amount.op in ("multiply", "divide"):
        factor = _unit_text(amount.args[1])
        if factor is None:
            break
        text = f"{' ' if amount.op == 'multiply' else '/'}{factor}{text}"
        amount, first = amount.args
    unit = read_unit(text, nouns=False) if text else None
    if unit is None or amount.symbols() or (spaced and not _is_spaced(first)):
        return None
    return Quantity(apply("negate", amount) if product.op == "negate" else amount, unit, product)


def is_certain(quantity: Quantity, *, is_reference: bool) -> bool:
    """Return whether an amount has a unit rather than variables, so that it is right without its unit, too.

    Args:
        quantity: an amount. The letters of "5 m" and "5 m/s" are a unit, those of "5 h^2" and "5 h m" are not.
        is_reference: Whether it is the reference, whose number must be plain. For an answer, m^2 and m^3 are units.
    """
    if quantity.product is None:
        return True
    product = _positive(quantity.product)
    product = product.args[0] if product.op == "divide" else product
    if product.op != "multiply" or product.args[0].symbols():
        return False
    amount, unit = product.args
    if unit.op == "power" and not is_reference:
        return unit.args[0].name == "m" and unit.args[1] in _SQUARE_AND_CUBE
    return unit.op in ("symbol", "divide") and (amount.op == "number" or not is_reference)


def _positive(product: Expr) -> Expr:
    return product.args[0] if product.op == "negate" else product


def _unit_text(factor: Expr) -> str | None:
    """Return the text of a letter, its power, or a fraction of both, if the letters are units."""
    match factor:
        case Expr(op="symbol", name=name):
            name = name.replace(r"\Omega", "Ω")
            return name if name in SYMBOL_UNITS else None
        case Expr(op="power", args=(Expr(op="symbol") as letter, exponent)):
            value = -exponent.args[0].value if exponent.op == "negate" else exponent.value
            text = _unit_text(letter)
            return f"{text}^{value}" if text and value else None
        case Expr(op="divide", args=(above, Expr(op="symbol" | "power") as below)):
            texts = _unit_text(above), _unit_text(below)
            return "/".join(map(str, texts)) if all(texts) else None
    return None


def _is_spaced(factor: Expr) -> bool:
    return factor.spaced or bool(factor.args and _is_spaced(factor.args[0]))
