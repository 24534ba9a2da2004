"""Answers that are words: names, yes and no, number words, dates, times, letters of choices, chemical formulas."""

from __future__ import annotations

import re

from rlsys.tasks.answers.reading.lexer import FUNCTIONS, is_wordlike
from rlsys.tasks.answers.values import (
    REAL_LINE,
    Clock,
    Date,
    Sequence,
    UnreadableError,
    Value,
    Words,
    names_of,
)

_MONTHS = names_of("january february march april may june july august september october november december")
_MONTH = "|".join(rf"{name[:3]}(?:{name[3:]}|t)?\.?" if name != "may" else "may" for name in _MONTHS)
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?"
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})",
        rf"{_WEEKDAY}(?P<month>{_MONTH})\s+{_DAY}(?:,?\s+(?P<year>\d{{4}}))?",
        rf"{_WEEKDAY}(?:the\s+)?{_DAY}\s+(?:of\s+)?(?P<month>{_MONTH})(?:,?\s+(?P<year>\d{{4}}))?",
        rf"(?P<month>{_MONTH}),?\s+(?P<year>\d{{4}})",
    )
)
_SLASHED = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
_CLOCK = re.compile(
    r"(?:(\d{1,2})(?::(\d{2})(?::(\d{2}))?)?\s*)?(?:([ap])\.?\s*m\.?|(noon|midnight)|(o'clock))?", re.IGNORECASE
)

_EMPTY = re.compile(r"(?:the )?empty set|(?:there (?:is|are) )?no (?:real )?(?:solutions?|roots?)(?: exists?)?")
_REALS = frozenset({"all real numbers", "all reals", "any real number", "the real numbers", "the set of real numbers"})
# Letters that name something in mathematics.
_NAMES = frozenset({*FUNCTIONS, *["pi", "infinity", "inf", "oo", "mod"]})
_WORDS = re.compile(r"(?:[^\W\d_]|['’\-.!?\"&,/]|\s)+")

_ELEMENTS = names_of(
    "He Li Be Ne Na Mg Al Si Cl Ar Ca Sc Ti Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Zr Nb Mo Tc Ru "
    "Rh Pd Ag Cd In Sn Sb Te Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa Np Pu Am Cm Bk Cf Es Fm Md No Lr H B C N O F P S K V Y I W U"
)
_ELEMENT = "|".join(_ELEMENTS)
_FORMULA = re.compile(rf"(?:(?:{_ELEMENT}|\((?:(?:{_ELEMENT})\d*)+\))\d*)+(?:\^?\d*[+-])?")
_CHOICE = re.compile(
    r"(?:(?i:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is\b)?)\s*:?\s*)?[(\[]?\s*(?P<letter>[A-Ja-j])\s*(?P<close>[).:\]]{0,2})"
    r"(?P<rest>\s+(?!\(?\s*(?i:or|and|is|isn't|was|but|nor|wrong|incorrect)\b)(?:-(?=\S))?[\w$\\({\[|\"'.].*)?",
    re.DOTALL,
)


def read_words(plain: str) -> Value | None:
    """Return the value of a normalised text without mathematics: words, a date, a time or a formula."""
    for read in (_read_clock, _read_date, _read_phrase, _read_set, _read_formula):
        value = read(plain)
        if value is not None:
            return value
    return None


def same_words(reference: Words, answer: Words) -> bool:
    """Return whether two texts have the same words; the letters of formulas are case-sensitive."""
    if reference.formula and answer.formula:
        return reference.text == answer.text
    letters = reference.letters, answer.letters
    if all(letters) and not any(map(is_wordlike, letters)):  # products; two capitals may be a segment
        return letters[0] == letters[1] or (all(map(str.islower, letters)) and sorted(letters[0]) == sorted(letters[1]))
    return reference.text.casefold() == answer.text.casefold()


def choice_letter(plain: str) -> str | None:
    """Return the letter that a reference consists of, such as "B", "(b)" or "option B".

    A bare "b" is a variable.
    """
    match = _CHOICE.fullmatch(plain)
    is_variable = len(plain) == 1 and plain.islower()
    return match["letter"].upper() if match and not match["rest"] and not is_variable else None


def chosen_letter(plain: str) -> str | None:
    """Return the letter that an answer chooses. The text of the choice may follow, but no other letter."""
    match = _CHOICE.fullmatch(plain)
    if match is None:
        return None
    if match["rest"] and (not match["close"] or re.search(r"(?<![A-Za-z'])[A-J](?![A-Za-z'])", match["rest"])):
        return None
    return match["letter"].upper()


def squeeze(plain: str) -> str:
    """Return a normalised text without the characters that change no meaning, for a comparison of texts."""
    text = re.sub(r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2", plain)
    return re.sub(r"(?<![\w,])\s+|\s+(?!\w)|(?<=,)\s+(?!\d{3}(?!\d))", "", " ".join(text.split()))


def _read_clock(plain: str) -> Clock | None:
    match = _CLOCK.fullmatch(plain)
    if match is None or not (match[2] or any(match.groups()[3:])) or not (match[1] or match[5]):
        return None
    hour, minute, second = (int(match[place] or default) for place, default in ((1, 12), (2, 0), (3, 0)))
    half = f"{match[4].lower()}m" if match[4] else {"noon": "pm", "midnight": "am"}.get((match[5] or "").lower(), "")
    is_time = hour <= (12 if half else 24) and minute <= 59 and second <= 59 and (not match[5] or hour == 12)
    return Clock(hour, minute, second, half) if is_time else None


def _read_date(plain: str) -> Date | None:
    slashed = _SLASHED.fullmatch(plain)
    if slashed:
        first, second, year = map(int, slashed.groups())
        if first <= 12 and second <= 12 and first != second:
            raise UnreadableError(f"{plain!r}: the day and the month cannot be told apart")
        return _date(year, min(first, second), max(first, second))
    for pattern in _DATES:
        match = pattern.fullmatch(plain)
        if match:
            fields = match.groupdict()
            name = fields["month"].lower()
            month = int(name) if name.isdigit() else 1 + [month[:3] for month in _MONTHS].index(name[:3])
            return _date(int(fields.get("year") or 0), month, int(fields.get("day") or 0))
    return None


def _date(year: int, month: int, day: int) -> Date:
    if not 1 <= month <= 12 or day > 31:
        raise UnreadableError(f"no day {day} of month {month}")
    return Date(year, month, day)


def _read_phrase(plain: str) -> Value | None:
    """Read letters only: number words, known phrases, names, and lists of names."""
    if not _WORDS.fullmatch(plain) or len(re.findall(r"[^\W\d_]", plain)) < 2:
        return None
    original = "does not exist" if plain == "DNE" else _trimmed(plain)
    phrase = original.casefold()
    if _EMPTY.fullmatch(phrase):
        return Sequence("{}", ())
    if phrase in _REALS:
        return REAL_LINE
    words = re.findall(r"[^\W\d_]+", phrase)
    if (
        set(words) & _NAMES
        or re.search(r"[a-z]\s*/|[a-z]\s*-\s+|\A-|!\Z", phrase)
        or all(len(word) == 1 for word in words)
    ):
        return None
    if _formula(plain) and phrase not in ("no", "yes"):
        return None
    return _list_of_words(original)


def read_any_words(plain: str) -> Words | None:
    """Return a text of words that is not mathematics, though it has letters that stand alone."""
    return _words(_trimmed(plain)) if _WORDS.fullmatch(plain) and re.search(r"[^\W\d_]{2}", plain) else None


def _read_set(plain: str) -> Sequence | None:
    """Read a set of words, such as {red, blue}. Up to three letters alone are products."""
    match = re.fullmatch(r"\\?\{([^{}\\]*)\\?\}", plain)
    words = _read_phrase(match[1].strip()) if match else None
    items = words.items if isinstance(words, Sequence) and words.joiner == "," else ()
    return Sequence("{}", items) if any(isinstance(item, Words) and not item.letters for item in items) else None


def _trimmed(plain: str) -> str:
    """Return words without final punctuation. A factorial or a question mark stays."""
    text = plain.strip(' .",')
    return text[:-1] if re.fullmatch(r"yes!|no!|.*[^\W\d_]{4,}!", text, re.IGNORECASE) else text


def _list_of_words(phrase: str) -> Value | None:
    parts = re.split(r"\s*,\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+", phrase)
    if len(parts) == 1:
        return _words(phrase)
    if any(len(part) < 2 for part in parts):  # "x and y" are symbols
        return None
    joiner = "or" if re.search(r"\sor\s", phrase) else ","
    return Sequence("", tuple(map(_words, parts)), joiner)


def _words(phrase: str) -> Words:
    """Return words without an article."""
    text = re.sub(r"\A(?:the|an|a)\s+(?=\S)", "", phrase, flags=re.IGNORECASE)
    is_product = re.fullmatch("[A-Za-z]{2,3}", text) and text.lower() not in ("no", "yes")
    return Words(text.casefold().replace(".", ""), letters=text if is_product else "")


def _read_formula(plain: str) -> Words | None:
    formula = _formula(plain)
    letters = formula if formula and re.fullmatch("[A-Za-z]{2,3}", formula) else ""
    return Words(formula, formula=True, letters=letters) if formula else None


def _formula(plain: str) -> str | None:
    """Return the canonical form of a chemical formula: two elements, an element with two letters, or a count."""
    squeezed = re.sub(r"[\s_{}]", "", plain)
    if len(squeezed) < 2 or not _FORMULA.fullmatch(squeezed) or re.fullmatch(r"[0-9A-F]+_\{?1[1-6]\}?", plain):
        return None
    if re.search(r"\)\(|\A\(", squeezed):
        return None  # a product of brackets, or the letter of a choice
    return squeezed.replace("^", "")
