"""Normalisation of text: Unicode, markup, spaces and final punctuation. It changes no meaning."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from itertools import groupby

from rlsys.tasks.answers.reading.units import name_of_letter, read_unit
from rlsys.tasks.answers.values import names_of

_CHARACTERS = {
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\u2012\ufe63\uff0d", "-"),
    **dict.fromkeys("·⋅∙•×∗", "*"), **dict.fromkeys("÷∕⁄", "/"), **dict.fromkeys("…⋯", r"\ldots "),
    **dict.fromkeys("“”„«»", '"'), **dict.fromkeys("‘’ʼ′", "'"), "″": "''", "∶": ":", "∣": "|",
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∞": r"\infty ", "∅": r"\emptyset ", "⩽": "≤", "⩾": "≥",
    "º": "°", "˚": "°", "ℝ": r"\mathbb{R}", "∠": r"\angle ", "△": r"\triangle ", "ℤ": r"\mathbb{Z}", "µ": r"\mu ",
    "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
}  # fmt: skip
# Signs that are no ASCII characters; their commands become them.
SIGNS = "≤≥≠≈≡∈∪∩∖±∓⌊⌋⌈⌉⟨⟩°"
_GREEK = re.compile("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)")
_FORMATTING = (
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|textup|emph|underline|mbox|hbox|mathrm|mathbf|mathit|mathsf|"
    r"mathtt|mathnormal|boldsymbol|bm|operatorname\*?|ce|fbox|boxed|mathop|phantom|vec|hat|overrightarrow|"
    r"(?:text)?color\s*\{[a-z]*\})"
)
_FORMATTED = re.compile(_FORMATTING + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_BARE_ACCENT = re.compile(r"(\\(?:vec|hat|mathbf|mathrm))\s+([A-Za-z])(?![A-Za-z])")
# The letters of a unit in upright type after a number, such as 5\text{ m}^2, are no variables.
_UPRIGHT_UNIT = re.compile(
    r"(?<=[\d})])((?:\s|\\[,;:! ]|~)*)\\(?:text|textrm|textnormal|textup|mbox|hbox|mathrm)\s*\{([^{}]*)\}"
)
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_COMMANDS = {
    name: replacement
    for replacement, names in {
        r"\frac": "dfrac tfrac cfrac sfrac xfrac nicefrac", r"\binom": "dbinom tbinom", r"\emptyset ": "varnothing O",
        r"\ldots ": "dots cdots dotsc dotsb", r"\{": "lbrace", r"\}": "rbrace", r"\mathbb{R}": "Re R",
        "|": "lvert rvert vert mid",
        "*": "times cdot ast star", "/": "div", ":": "colon", "<": "lt", ">": "gt", "≤": "le leq leqslant leqq",
        "≥": "ge geq geqslant geqq", "≠": "ne neq", "≈": "approx sim", "≡": "equiv", "∈": "in", "∪": "cup bigcup",
        "∩": "cap bigcap", "∖": "setminus backslash", "±": "pm", "∓": "mp", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil",
        "⌉": "rceil", "⟨": "langle", "⟩": "rangle", "°": "degree degrees", " or ": "lor vee", " and ": "land wedge",
        " mod ": "mod bmod pmod", " ": "quad qquad enspace thinspace medspace thickspace space nobreakspace",
        "": "left right middle bigl bigr bigm big biggl biggr biggm bigg Bigl Bigr Bigm Big Biggl Biggr Biggm Bigg "
        "displaystyle textstyle scriptstyle limits nolimits bf rm it boldmath hfill small large Large huge Huge",
        **{f"\\{name}": f"var{name}" for name in names_of("epsilon theta phi rho sigma")},
    }.items()
    for name in names.split()
}  # fmt: skip
_RENAMED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (
            r"\\begin\s*\{((?:align|equation|gather|split|cases)[a-z]*\*?)\}(.*?)\\end\s*\{\1\}",
            lambda match: _one_line(match[2]),
        ),
        (r"(=[^\n,;]*[^\n,;\s])\s*(?:\n|\\\\|\\q?quad(?![a-zA-Z]))\s*(?=[a-zA-Z]\s*=)", r"\1, "),
        (r"<(b|i|u|em|strong|span|code|p)>(.*?)</\1>", r" \2 "),
        (r"<su([pb])>([^<>]*)</su\1>", lambda match: f"{'^' if match[1] == 'p' else '_'}{{{match[2]}}}"),
        (r"(?<=\.)(\d*)\\(?:bar|dot|overline)\s*(?:\{\s*(\d+)\s*\}|(\d))", r"\1\\overline{\2\3}"),
        (r"\^\s*(?:\{\s*(?:\\circ|o)\s*\}|\\circ(?![a-zA-Z])|o\b|°)|\{\s*°\s*\}", "°"),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\not\s*=", "≠"),
        (r"\^\s*(?:\{((?:\s*\\prime)+)\s*\}|(\\prime)(?![a-zA-Z]))", lambda match: "'" * match[0].count("prime")),
        (r"\\(?:mathbb|Bbb)\s*(?:\{\s*R\s*\}|R(?![a-zA-Z]))", r"\\mathbb{R}"),
        (r"(?<![\w)}\]])\^\{-\}(?=\d)", "-"),
        (r"(?<=[)\]}])\s+(?:union|or union)\s+(?=[(\[{\\])", "∪"),
        (r"(?<=[)\]}])\s+(?:intersection|intersect)\s+(?=[(\[{\\])", "∩"),
        (r"\\([a-zA-Z]+)", lambda match: _COMMANDS.get(match[1], match[0])),
        (r"(?<=[)\]}])\s*U\s*(?=[(\[{\\])", "∪"),
        (r"\.\.\.+", r"\\ldots "),
        (r"\+\s?/\s?-", "±"),
        (r"(?<=[\d }])per cent\b", "percent"),
        (r"\\([%#&_])", r"\1"),
        (r"(?<!\\)\\[,;:>! ]|(?!\A)~|\\[hv]space\*?\{[^{}]*\}", " "),
    )
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
    """Return a text with the core commands and signs of mathematics, without markup around the whole."""
    text = peel(plain_characters(text))
    for pattern, replacement in _THOUSANDS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=\d)\u2009(?=\d)", "", text)
    text = text.replace(r"\$", "$")
    text = _BARE_ACCENT.sub(r"\1{\2}", text)
    text = _UPRIGHT_UNIT.sub(_spelled_unit, text)
    previous = None
    while previous != text:
        previous = text
        text = _FORMATTED.sub(_unwrap, text)
    for pattern, renamed in _RENAMED:
        text = pattern.sub(renamed, text)
    return peel(" ".join(text.split()))


def plain_characters(text: str) -> str:
    """Return a text with the characters of mathematics as LaTeX, and without invisible characters."""
    if text.isascii():
        return text
    parts = []
    for mark, run in groupby(text, _script):
        plain = "".join(map(_plain_character, run))
        parts.append(f"{mark}{{{plain}}}" if mark else plain)
    return re.sub(r"\^\{([^{}]+)\}/_\{([^{}]+)\}", r"\\frac{\1}{\2}", unicodedata.normalize("NFC", "".join(parts)))


def _script(character: str) -> str:
    """Return the mark of a superscript or subscript."""
    kind = "" if character in _CHARACTERS else unicodedata.decomposition(character).partition(" ")[0]
    return {"<super>": "^", "<sub>": "_"}.get(kind, "")


def _one_line(lines: str) -> str:
    """Return the lines of an aligned formula: a chain of equations, or items of a list."""
    chain = re.sub(r"\\\\(?:\[[^\]]*\])?\s*(?=&?\s*=)", " ", lines).replace("&", " ")
    return ", ".join(line.strip(" ,;") for line in re.split(r"\\\\(?:\[[^\]]*\])?", chain) if line.strip())


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    greek = _GREEK.fullmatch(unicodedata.name(character, ""))
    if greek:
        name = greek[2].lower().replace("lamda", "lambda")
        return f"\\{name if greek[1] == 'SMALL' else name.capitalize()} "
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    if category in ("Zs", "Zl", "Zp"):
        return " "
    compatible = unicodedata.normalize("NFKC", character)
    if "\u2044" in compatible:  # a fraction such as ½
        above, _, below = compatible.partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}"
    return character if compatible == character else "".join(map(_plain_character, compatible))


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


def _spelled_unit(match: re.Match[str]) -> str:
    """Return a unit in upright type after a number with the names of its letters, such as " meter/second"."""
    text = re.sub(r"\\[,;:! ]|~", " ", match[2])
    names = {letter: name_of_letter(letter) for letter in _LETTER.findall(text)}
    if not names or not all(names.values()) or read_unit(text, nouns=False) is None:
        return match[0]
    return f" {_LETTER.sub(lambda letter: str(names[letter[0]]), text)} "


def _unwrap(match: re.Match[str]) -> str:
    """Return the content of a formatting command. Spaces keep its words apart from letters beside them."""
    if match[0].startswith((r"\phantom", r"\hphantom")):
        return " "
    content = match[1]
    return f" {content} " if re.search("[A-Za-z]", content) else content
