"""Normalisation of text: Unicode, markup, spaces and final punctuation. It changes no meaning."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from rlsys.tasks.answers.expressions import names_of

_CHARACTERS = {
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\u2012\ufe63\uff0d", "-"),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("“”„«»", '"'),
    **dict.fromkeys("‘’ʼ", "'"),
    "′": "'",
    "″": "''",
    "×": r"\times ",
    "÷": r"\div ",
    "∕": "/",
    "⁄": "/",
    "∗": "*",
    "∶": ":",
    "∣": "|",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3]",
    "∜": r"\sqrt[4]",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∅": r"\emptyset ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "º": "°",
    "˚": "°",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∑": r"\sum ",
    "∏": r"\prod ",
    "∫": r"\int ",
    "…": r"\ldots ",
    "⋯": r"\ldots ",
    "π": r"\pi ",
    "µ": r"\mu ",
}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ", "0123456789+-nx", strict=True))
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_GREEK = dict(
    zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ", names_of(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi "
        "chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
    ), strict=True)
)  # fmt: skip

_FORMATTING = (
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|textup|emph|underline|mbox|hbox|mathrm|mathbf|mathit|mathsf|"
    r"mathtt|mathnormal|boldsymbol|bm|operatorname\*?|ce|fbox|boxed|mathop|phantom)"
)
_FORMATTED = re.compile(_FORMATTING + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_DROPPED = re.compile(
    r"\\(?:left|right)\s*\.|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])"
    r"|\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|boldmath|hfill|small|large|Large|huge|Huge)"
    r"(?![a-zA-Z])"
)
_SPACING = re.compile(
    r"(?<!\\)\\[,;:>! ]|(?!\A)~|\\(?:quad|qquad|enspace|thinspace|medspace|thickspace|space|nobreakspace)(?![a-zA-Z])"
    r"|\\[hv]space\*?\{[^{}]*\}"
)
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\leq?(?:slant|q)?(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\geq?(?:slant|q)?(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])|\\not\s*="), r"\\ne "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![a-zA-Z])"), "|"),
    (re.compile(r"\\(?:mid)(?![a-zA-Z])"), "|"),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\(?:dots|cdots|dotsc|dotsb)(?![a-zA-Z])|\.\.\.+"), r"\\ldots "),
    (re.compile(r"\\(?:ast|star)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\var(?=epsilon|theta|phi|rho|sigma)"), r"\\"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?:s)?(?![a-zA-Z])|\{\s*°\s*\}|\^\s*°"), "°"),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\\(?:Re|R)(?![a-zA-Z])|\\mathbb\s*R"), r"\\mathbb{R}"),
)
_THOUSANDS = (
    # 1{,}234 and 11,\! 111 and 1\,234 are one number each.
    (re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), "."),
    (re.compile(r"(?<=\d),\s*\\!\s*(?=\d{3})"), ","),
    (re.compile(r"(?<=\d)\s*\\[,!]\s*(?=\d{3}(?!\d))|(?<=\d)\\ (?=\d{3}(?!\d))"), "\u2009"),
)
_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"),
    ("***", "***"), ("**", "**"), ("__", "__"), ("```", "```"), ("`", "`"), ("*", "*"), ("_", "_"),
    ('"', '"'), ("'", "'"),
)  # fmt: skip


@lru_cache(maxsize=1024)
def normalise(text: str) -> str:
    """Return a text in ASCII with the core commands of LaTeX, without markup around the whole."""
    text = peel(plain_characters(text))
    for pattern, replacement in _THOUSANDS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=\d)\u2009(?=\d)", "", text)
    text = text.replace(r"\$", "$")
    previous = None
    while previous != text:
        previous = text
        text = _FORMATTED.sub(_unwrap, text)
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    text = _SPACING.sub(" ", _DROPPED.sub("", text))
    return peel(" ".join(text.split()))


def plain_characters(text: str) -> str:
    """Return a text with the characters of mathematics as LaTeX, and without invisible characters."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda run: f"^{{{''.join(_SUPERSCRIPTS[one] for one in run[0])}}}", text)
    text = _SUBSCRIPT.sub(lambda run: f"_{{{''.join(_SUBSCRIPTS[one] for one in run[0])}}}", text)
    return unicodedata.normalize("NFKC", "".join(map(_plain_character, text)))


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if character in _GREEK:
        return f"\\{_GREEK[character]} "
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    if category in ("Zs", "Zl", "Zp"):
        return " "
    compatible = unicodedata.normalize("NFKC", character)
    if "\u2044" in compatible:  # a fraction such as ½
        above, _, below = compatible.partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}"
    return character


def peel(text: str) -> str:
    """Return a text without spaces, final punctuation, and pairs of markup around the whole text."""
    previous = None
    while previous != text:
        previous = text
        text = text.strip().strip("\u200b")
        text = re.sub(r"\A#{1,6}\s+(?=\S)|(?<!\\)\\\Z", "", text)
        if re.search(r"[^.\\]\.\Z|[^.\\][;,]\Z", text) and not text.endswith(r"\right."):
            text = text[:-1]
        for start, end in _WRAPPERS:
            text = _without(text, start, end)
    return text


def _without(text: str, start: str, end: str) -> str:
    """Return the text between two marks, if they enclose the whole text and stand nowhere inside."""
    if len(text) <= len(start) + len(end) or not (text.startswith(start) and text.endswith(end)):
        return text
    inner = text[len(start) : len(text) - len(end)]
    plain = inner.replace(r"\$", "")
    if start in plain or end in plain or (start.startswith("_") and not inner[0].isalnum()):
        return text
    return inner


def _unwrap(match: re.Match[str]) -> str:
    """Return the content of a formatting command. Spaces keep its words apart from letters beside them."""
    if match[0].startswith((r"\phantom", r"\hphantom")):
        return " "
    content = match[1]
    return f" {content} " if re.search("[A-Za-z]", content) else content
