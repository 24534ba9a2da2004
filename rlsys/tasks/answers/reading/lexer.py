"""Tokens of a normalised answer. Every character belongs to a token, or the answer is unreadable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from rlsys.tasks.answers.normalise import SIGNS
from rlsys.tasks.answers.reading.units import CURRENCIES, GLUED_UNITS, read_unit
from rlsys.tasks.answers.values import Based, Expr, UnreadableError, apply, names_of, number

MAX_TOKENS = 400
# A larger power of ten stays an operation.
MAX_EXPONENT = 5000

FUNCTIONS = frozenset(
    names_of(
        "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc asin acos atan sinh cosh tanh coth "
        "ln log lg exp sqrt cbrt abs floor ceil gcd lcm max min det"
    )
)
_GREEK = frozenset(
    names_of(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi "
        "chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
    )
)
_COMMANDS = frozenset(names_of("frac sqrt binom choose over infty pi emptyset mathbb sum prod int lim to rightarrow"))
_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<matrix>(?P<open>[(\[]\s*)?\\begin\s*\{[a-zA-Z]*(?:matrix|array)\}.*?\\end\s*\{[a-zA-Z]*(?:matrix|array)\}"
    r"(?(open)\s*[)\]]))"
    r"|(?P<based>[0-9A-F]+\s*_\s*(?:\d+|\{\s*\d+\s*\}))"
    r"|(?P<repeating>\d*\.\d*\\overline\s*\{\d+\}|\d*\.\d*\(\d+\))"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![\d.a-zA-Z]))?|\d+\.(?!\d))"
    r"|(?P<brace>\\[{}])"
    r"|\\(?P<command>[a-zA-Z]+)"
    r"|(?P<letters>[a-zA-Z]+(?:'(?!s\b)[a-zA-Z]+)?)"
    r"|(?P<relation><=|>=|(?<![\d)}])!=|==|=<|->|\+-|-\+)"
    r"|(?P<other>\*\*|.)",
    re.DOTALL,
)
_RENAMED = {"<=": "≤", "=<": "≤", ">=": "≥", "!=": "≠", "==": "=", "**": "^", "&": "and"}
_OPERATORS = frozenset("+-*/^!|()[]{},;:=<>%_'." + SIGNS + CURRENCIES + "¢Ω")
_GROUPED = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_MARKED_GROUPS = re.compile(
    r"(?<![\w.])\d{1,3}(?:(?:'\d{3})+|(?:[._]\d{3}){2,})(?![\w.])"
    r"|(?<![\d.,])(?<!\d )\d{1,3}(?: \d{3})+(?![\d,/])(?! \d)"
)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_SHORT_WORDS = frozenset(names_of("am an as at be by do go he hi if in is it me my no of oh ok on or so to up us we"))


@dataclass(frozen=True, slots=True)
class Token:
    """A token.

    Attributes:
        kind: "number", "repeating", "based", "symbol", "function", "word", "matrix", "command" or "sign".
        start: Position in the text.
        spaced: Whether white space stands before it.
    """

    kind: str
    text: str
    start: int
    end: int
    spaced: bool = False


def tokens_of(text: str) -> list[Token]:
    """Return the tokens of a normalised text.

    Raises:
        UnreadableError: the text has an unknown command or character, or is too long.
    """
    tokens: list[Token] = []
    spaced = False
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "space":
            spaced = True
            continue
        tokens.extend(_read(match, spaced, tokens))
        spaced = False
        if len(tokens) > MAX_TOKENS:
            raise UnreadableError(f"more than {MAX_TOKENS} symbols")
    return tokens


def _read(match: re.Match[str], spaced: bool, before: Sequence[Token]) -> list[Token]:
    kind, text = match.lastgroup or "", match[0]
    start, end = match.span()
    if kind == "brace":
        return [Token("sign", text, start, end, spaced)]
    if kind in ("matrix", "repeating", "number"):
        return [Token(kind, text, start, end, spaced)]
    if kind == "based":
        return _read_based(text, start, end, spaced)
    if kind == "command":
        return [_read_command(match["command"], start, end, spaced)]
    if kind == "letters":
        return _read_letters(text, start, spaced, before)
    sign = _RENAMED.get(text, text)
    if sign not in _OPERATORS and sign != "and":
        raise UnreadableError(f"the character {text!r}")
    return [Token("sign", sign, start, end, spaced)]


def _read_based(text: str, start: int, end: int, spaced: bool) -> list[Token]:
    """Read digits with a base; a letter with an index, such as A_1, is a symbol."""
    digits, _, index = re.sub(r"[\s{}]", "", text).partition("_")
    if not digits[0].isdigit() and len(digits) == 1:
        return [Token("symbol", f"{digits}_{index}", start, end, spaced)]
    return [Token("based", f"{digits}_{index}", start, end, spaced)]


def _read_command(name: str, start: int, end: int, spaced: bool) -> Token:
    if name in FUNCTIONS:
        return Token("function", name, start, end, spaced)
    if name in _GREEK:
        return Token("symbol", f"\\{name}", start, end, spaced)
    if name in _COMMANDS:
        return Token("command", name, start, end, spaced)
    raise UnreadableError(f"the command \\{name}")


def _read_letters(text: str, start: int, spaced: bool, before: Sequence[Token]) -> list[Token]:
    """Split letters into names of functions and constants, and single symbols. Words stay whole."""
    end = start + len(text)
    after_number = bool(before) and (before[-1].kind != "sign" or before[-1].text in ("}", ")"))
    if text in ("and", "or", "mod", "modulo"):
        return [Token("sign", text[:3], start, end, spaced)]
    if text.lower() in ("infinity", "inf", "oo") and text != "OO":
        return [Token("command", "infty", start, end, spaced)]
    if text in ("pi", "Pi"):
        return [Token("command", "pi", start, end, spaced)]
    is_pair = len(text) == 2 and text.islower()
    is_known = len(text) > 3 or (spaced and after_number and len(text) > 1 and not is_pair)
    is_unit = is_known and read_unit(text, nouns=False) is not None  # a pint is not pi*n*t
    is_glued = text in GLUED_UNITS and (not is_pair or _may_be_unit(text, before))  # mg is also m*g
    if is_unit or is_glued or (text in ("sec", "min", "in") and after_number):
        return [Token("word", text, start, end, spaced)]
    if text in FUNCTIONS:
        return [Token("function", text, start, end, spaced)]
    for name in sorted({*FUNCTIONS, "pi"}, key=len, reverse=True):
        if text.startswith(name) and len(text) - len(name) <= 2 and name not in ("max", "min", "det", "abs", "lg"):
            kind = "command" if name == "pi" else "function"
            middle = start + len(name)
            return [Token(kind, name, start, middle, spaced), *_symbols(text[len(name) :], middle)]
    if len(text) > 3 or (spaced and after_number and len(text) == 3 and is_wordlike(text)):
        return [Token("word", text, start, end, spaced)]
    return _symbols(text, start, spaced)


def _may_be_unit(text: str, before: Sequence[Token]) -> bool:
    """Return whether two letters may be a unit: not in brackets, except in a fraction after a number.

    After pi, they are a length.
    """
    signs = [token.text for token in before if token.kind == "sign"]
    is_inside = signs.count("{") + signs.count("(") > signs.count("}") + signs.count(")")
    if is_inside and not any(one.kind == "number" and other.text == "frac" for one, other in pairwise(before)):
        return False
    unit = read_unit(text, nouns=False)
    is_length = unit is not None and unit.dimension[0][0] == "metre"
    return is_length or not before or before[-1].text != "pi"


def _symbols(text: str, start: int, spaced: bool = False) -> list[Token]:
    return [
        Token("symbol", letter, start + place, start + place + 1, spaced and not place)
        for place, letter in enumerate(text)
    ]


def is_wordlike(text: str) -> bool:
    """Return whether two or three letters are a word rather than a product: a vowel, and not letters in sequence."""
    lower = text.lower()
    return lower in _SHORT_WORDS or (len(text) == 3 and bool(set(lower) & set("aeiou")) and lower not in _ALPHABET)


def join_numbers(text: str) -> str:
    """Remove the separators of thousands, as in "1,234" and "1 234" but not in "(1,234)", and mark mixed numbers.

    Inside brackets, a comma separates items unless another comma of the same brackets has a space after it.
    """
    depths, commas = _comma_depths(text)
    spaced_brackets = {depths[place] for place in commas if text[place + 1 : place + 2] == " "}

    def joined(match: re.Match[str]) -> str:
        bracket = depths[match.start() + match[0].index(",")]
        return match[0].replace(",", "") if bracket == 0 or bracket in spaced_brackets else match[0]

    text = _GROUPED.sub(joined, text) if commas else text
    text = re.sub(r"(?<![\d.])\d{1,3}(?:\.\d{3})+,\d+(?![\d.,])", _european, text)
    text = _MARKED_GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    return re.sub(r"(?<![\d.,/^])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}", text)


def _european(match: re.Match[str]) -> str:
    return match[0].replace(".", "").replace(",", ".")


def _comma_depths(text: str) -> tuple[list[int], list[int]]:
    """Return for every position the number of its brackets, 0 outside, and the positions of all commas."""
    depths, commas, stack, count = [], [], [0], 0
    for place, character in enumerate(text):
        if character in "([{⟨":
            is_group = character == "{" and bool(
                re.search(r"(?:\\[a-zA-Z]+|[\^_}\]])\s*\Z", text[max(0, place - 20) : place])
            )
            count += 1
            stack.append(stack[-1] if is_group else count)
        elif character in ")]}⟩" and len(stack) > 1:
            stack.pop()
        elif character == ",":
            commas.append(place)
        depths.append(stack[-1])
    return depths, commas


def read_decimal(text: str) -> Expr:
    """Return a number with the unit of its last digit; a large power of ten stays an operation."""
    mantissa, _, exponent = text.lower().partition("e")
    digits = mantissa.partition(".")[2]
    power = int(exponent or 0)
    if abs(power) > MAX_EXPONENT:
        return apply("multiply", number(Fraction(mantissa)), apply("power", number(10), number(power)))
    is_exact = "." not in mantissa and not exponent
    step = None if is_exact else Fraction(10) ** (power - len(digits))
    return number(Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** power, step)


def read_based(text: str) -> Based:
    """Return the digits and the base of a text such as 2516_8."""
    digits, _, base = text.partition("_")
    if not 2 <= int(base) <= 36 or any(int(digit, 36) >= int(base) for digit in digits):
        raise UnreadableError(f"{text[:20]!r} has digits outside its base")
    return Based(digits.lstrip("0") or "0", int(base))


def read_repeating(text: str) -> Fraction:
    r"""Return the value of 0.1\overline{6} or 0.1(6)."""
    whole, fixed, repeated = re.match(r"(\d*)\.(\d*)[^\d]+(\d+)", text).groups()  # type: ignore[union-attr]
    size = 10 ** len(fixed)
    return Fraction(int(f"{whole}{fixed}" or 0), size) + Fraction(int(repeated), size * (10 ** len(repeated) - 1))
