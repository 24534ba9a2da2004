"""Numbers in words, such as "five", "ten thousand", "two thirds" or "half a million"."""

from __future__ import annotations

import re
from fractions import Fraction

from rlsys.tasks.answers.values import names_of

_ONES = names_of(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = names_of("twenty thirty forty fifty sixty seventy eighty ninety")
CARDINALS = {
    **{name: value for value, name in enumerate(_ONES)},
    **{name: 10 * place for place, name in enumerate(_TENS, start=2)},
}
SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7,
    "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
}  # fmt: skip
_PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fifth": 5, "ninth": 9, "twelfth": 12,
    **{
        f"{name[:-1]}ieth" if name.endswith("y") else f"{name.removesuffix('t')}th": value
        for name, value in {**CARDINALS, **SCALES}.items()
        if value > 3 and name not in ("five", "nine", "twelve", "dozen")
    },
}  # fmt: skip
_PARTS |= {"halves": 2, **{f"{name}s": value for name, value in _PARTS.items() if name != "half"}}
NUMBER_WORDS = frozenset({*CARDINALS, *SCALES, *_PARTS})
_CARDINAL = "|".join(sorted({*CARDINALS, *SCALES}, key=len, reverse=True))
_NUMBER = rf"(?:(?:{_CARDINAL})(?:(?:(?<=hundred|housand|million)\s+and)?[\s-]+(?=(?:{_CARDINAL})\b)|\b))+"
_LEADING = re.compile(
    rf"(?:half\s+an?\s+(?P<halved>{'|'.join(SCALES)})\b|(?P<half>half)(?:\s+an?\b|\Z)"
    rf"|(?:(?P<count>{_NUMBER})|an?\b)[\s-]+(?P<part>{'|'.join(_PARTS)})\b(?:\s+of\s+an?\b)?"
    rf"|(?P<whole>{_NUMBER}|(?=an?\s+(?:{'|'.join(SCALES)})\b)an?\s+{_NUMBER})(?P<and_half>\s+and\s+a\s+half\b)?)",
    re.IGNORECASE,
)


def with_digits(text: str) -> str:
    """Return a text whose number in words at the beginning is written with digits."""
    match = _LEADING.match(text)
    if match is None:
        return text
    if match["halved"]:
        value = Fraction(SCALES[match["halved"].lower()], 2)
    elif match["half"]:
        value = Fraction(1, 2)
    elif match["part"]:
        value = Fraction(_cardinal(match["count"] or "one") or 0, _PARTS[match["part"].lower()])
    else:
        value = Fraction(_cardinal(match["whole"]) or 0) + Fraction(bool(match["and_half"]), 2)
    is_zero = not value and match[0].lower() != "zero"
    return text if is_zero else f"{value}{text[match.end() :]}"


def _cardinal(text: str) -> int | None:
    """Return the value of words such as "two hundred and five", or None for "two three"."""
    total, current = 0, 0
    for word in re.findall("[a-z]+", text.lower()):
        if word in CARDINALS:
            is_one = 0 < CARDINALS[word] < 10
            if current % 100 and not (is_one and current % 100 >= 20 and current % 10 == 0):
                return None
            current += CARDINALS[word]
        elif word in SCALES and SCALES[word] <= 100:
            current = (current or 1) * SCALES[word]
        elif word in SCALES:
            total += (current or 1) * SCALES[word]
            current = 0
    return total + current
