"""Other notations of the same value: words and names before a number, intervals, combinations, feet and minutes."""

from __future__ import annotations

import re
from fractions import Fraction

from rlsys.tasks.answers.reading.number_words import with_digits
from rlsys.tasks.answers.reading.units import read_unit
from rlsys.tasks.answers.values import Marks, Quantity, number

_CURRENCY_NAMES = {"us$": "$", "usd": "$", "eur": "€", "gbp": "£", "inr": "₹", "rs": "₹", "jpy": "¥"}
_CURRENCY_NAME = re.compile(r"(?i)\A(us\$|usd|eur|gbp|inr|jpy|rs)\.?\s*(?=-?[\d.])")
_PLUS_MINUS = re.compile(r"(?i)\bplus(?:\s+or\s+|\s*[/-]\s*)minus\b")
_HOURS = re.compile(r"\A(\d+)\s*h(?:rs?)?\s*(\d+)\s*m(?:in)?\Z")
_ORDINAL = re.compile(r"\A(\d+)(?:st|nd|rd|th)\Z")
# Digits that are written at least three times before an ellipsis.
_REPEATED = re.compile(r"(?<![\d.])(\d*\.\d{0,9}?)(\d{1,6}?)\2{2,}\s*\\ldots\s*\Z")
_BASED_LOGARITHM = re.compile(r"(?<![a-zA-Z\\])log(2|10)(?=\s*\()")
_BRACKETED_UNIT = re.compile(r"(?<=[\d}])\s*\(([A-Za-z]{2,})\)\Z")
# Brackets that open away from the interval: ]2, 7[ is (2, 7).
_ENDS = r"\s*[^\[\](),;]+[,;]\s*[^\[\](),;\s][^\[\],;]*"
_OPEN_LEFT = re.compile(rf"(?<![\w)}}\]])\](?={_ENDS}[\[\]])")
_OPEN_RIGHT = re.compile(rf"(?<=[(\[])({_ENDS})\[(?=\s*(?:\Z|[∪∩∖,;)]|and\b|or\b))")
# Combinations C and permutations P; the first number is the larger one.
_COUNT = r"((?:\d*[kmnr]|\d+)(?:\s*[+-]\s*\d+)?)"
_INDEX = r"\s*\{?\s*([kmnr]|\d+)\s*\}?\s*"
_CHOSEN = tuple(
    re.compile(rf"(?<![\w.\\]){pattern}(?!\w)")
    for pattern in (
        rf"n?(?P<kind>[CP])r?\s*\(\s*{_COUNT}\s*[,;]\s*{_COUNT}\s*\)",  # C(10,3), nPr(5,2)
        rf"(?:\{{\s*\}}\s*)?[_^]{_INDEX}(?P<kind>[CP])\s*_{_INDEX}",  # _{10}C_3
        r"(\d+)\s*(?P<kind>[CP])\s*(\d+)",  # 10C3
        rf"(?P<kind>[CP])\s*_{_INDEX}\^{_INDEX}",  # C_{10}^3
    )
)
_AMOUNT = r"\d+(?:\.\d+)?(?:\s\d+/[1-9]\d*)?|\d+/[1-9]\d*"
_MARKS = re.compile(
    rf"(?:(?P<degrees>{_AMOUNT})\s*°\s*)?(?:(?P<first>{_AMOUNT})\s*'(?!')\s*)?"
    rf"(?:(?P<second>{_AMOUNT})\s*(?:\"|''))?(?<=['\"])"
)


def rephrased(plain: str) -> str:
    """Return a text with a number in words as digits, and names of a sign or a currency as signs."""
    plain = _PLUS_MINUS.sub("±", plain.removeprefix("=").lstrip() if re.match(r"=\s*[^\s=]", plain) else plain)
    plain = _HOURS.sub(r"\1 hours \2 minutes", _ORDINAL.sub(r"\1", plain))
    plain = _CURRENCY_NAME.sub(lambda match: _CURRENCY_NAMES[match[1].lower()], re.sub(r"\Aboth\s+", "", plain))
    negated = re.match(r"(?i)(?:negative|minus)\s+(?=\S)", plain)
    plain = f"-{with_digits(plain[negated.end() :])}" if negated else with_digits(plain)
    unit = _BRACKETED_UNIT.search(plain)
    return f"{plain[: unit.start()]} {unit[1]}" if unit and read_unit(unit[1], nouns=False) else plain


def standard_notation(plain: str) -> str:
    """Return a formula with round brackets at the open ends of intervals, and combinations as binomials."""
    plain = re.sub(r"(?<=\\mathbb\{R\})\s*-\s*(?=\\?\{)", "∖", _BASED_LOGARITHM.sub(r"\\log_{\1}", plain))
    plain = _REPEATED.sub(r"\1\\overline{\2}", plain)
    plain = _OPEN_RIGHT.sub(r"\1)", _OPEN_LEFT.sub("(", plain))
    for pattern in _CHOSEN:
        plain = pattern.sub(_chosen, plain)
    return plain


def _chosen(match: re.Match[str]) -> str:
    total, chosen = (group for group in match.groups() if group not in ("C", "P"))
    return (
        rf"\binom{{{total}}}{{{chosen}}}" if match["kind"] == "C" else rf"\frac{{({total})!}}{{({total}-({chosen}))!}}"
    )


def read_marks(plain: str) -> Marks | Quantity | None:
    """Read amounts before ' and ", such as 5'6"; after degrees, they are minutes and seconds of the angle."""
    match = _MARKS.fullmatch(plain)
    if match is None:
        return None
    degrees, first, second = (
        sum(map(Fraction, match[name].split()), Fraction()) if match[name] else None
        for name in ("degrees", "first", "second")
    )
    unit = read_unit("°", nouns=False)
    if degrees is None or unit is None:
        return Marks(first, second)
    return Quantity(number(degrees + Fraction(first or 0) / 60 + Fraction(second or 0) / 3600), unit)
