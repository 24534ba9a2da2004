"""Units of measurement, currencies and counted nouns."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from rlsys.tasks.answers.expressions import Unit, names_of

# Base unit, and for each unit its factor and its names. Letters alone are case-sensitive, longer names are not.
_TABLE: dict[str, dict[str, str]] = {
    "metre": {
        "1": "m meter metre",
        "1/100": "cm centimeter centimetre",
        "1/1000": "mm millimeter millimetre",
        "1000": "km kilometer kilometre",
        "127/5000": "in inch inches",
        "381/1250": "ft foot feet",
        "1143/1250": "yd yard",
        "201168/125": "mi mile",
    },
    "second": {
        "1": "s sec secs second",
        "1/1000": "ms millisecond",
        "60": "min mins minute",
        "3600": "h hr hrs hour",
        "86400": "day",
        "604800": "week",
    },
    "month": {"1": "month", "12": "yr yrs year"},
    "gram": {
        "1": "g gram gramme",
        "1/1000": "mg milligram",
        "1000": "kg kilogram kilo",
        "1000000": "tonne",
        "45359237/100000": "lb lbs pound",
        "45359237/1600000": "oz ounce",
    },
    "litre": {
        "1": "L l liter litre",
        "1/1000": "ml mL milliliter millilitre",
        "1/100": "cl centiliter centilitre",
        "473176473/1000000000": "pint",
        "473176473/500000000": "quart",
        "473176473/125000000": "gal gallon",
    },
    "dollar": {"1": "$ dollar usd buck", "1/100": "cent ¢"},
    "euro": {"1": "€ euro eur"},
    "british pound": {"1": "£ gbp"},
    "rupee": {"1": "₹ rupee inr rs"},
    "yen": {"1": "¥ yen jpy"},
    "degree": {"1": "° degree deg"},
    "radian": {"1": "rad radian"},
    "celsius": {"1": "degC celsius"},
    "fahrenheit": {"1": "degF fahrenheit"},
    "kelvin": {"1": "K kelvin"},
    "newton": {"1": "N newton"},
    "joule": {"1": "J joule", "1000": "kJ kilojoule"},
    "watt": {"1": "W watt", "1000": "kW kilowatt"},
    "volt": {"1": "V volt"},
    "ampere": {"1": "A amp ampere"},
    "ohm": {"1": "Ω ohm"},
    "hertz": {"1": "Hz hertz", "1000": "kHz kilohertz", "1000000": "MHz megahertz"},
    "pascal": {"1": "Pa pascal", "1000": "kPa kilopascal"},
    "mole": {"1": "mol mole"},
    "unit": {"1": "unit"},
}
_COMPOUND = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "fps": "ft/s", "cc": "cm^3", "sqft": "ft^2", "kmph": "km/h"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# A text with one of these words is more than an amount with a unit.
_NO_NOUNS = frozenset(
    names_of(
        "a about above add added all almost also although an and answer approx approximately are as at base "
        "be because below between billion but by check choose circa conjugate correct couple cubed difference "
        "divided double doubled dozen eight eighteen eighth eighty either eleven equal equals error even "
        "every exactly except factorial fake false fifteen fifth fifty first five fold for forty four "
        "fourteen fourth from greater gross guess half halve hence hundred hundredth if incorrect infinity "
        "instead invalid inverse is it last least less maximum maybe million millionth minimum minus mod "
        "modulo more most multiplied nearly negated negative neither never nine nineteen ninety ninth no none "
        "nor not odd off one only opposite or other otherwise over pair per percent percentage perhaps plus "
        "positive possible possibly power probably quarter quotient reciprocal remainder respectively root "
        "roughly score seven seventeen seventh seventy six sixteen sixth sixty so squared subtract sum ten "
        "tenfold tenth than that the then there third thirteen thirty though thousand thousandth three "
        "through thus times to triple tripled true twelve twenty twice two undefined under unknown unless "
        "until untrue up upto versus vs wait was when where whereas which while with within without wrong yet "
        "zero"
    )
)


def _names() -> dict[str, Unit]:
    units = {}
    for base, factors in _TABLE.items():
        for factor, names in factors.items():
            for name in names.split():
                units[name] = Unit(((base, 1),), Fraction(factor))
    return units


_UNITS = _names()
SYMBOL_UNITS = frozenset(name for name in _UNITS if len(name) == 1 and name.isalpha())
CURRENCIES = "$€£₹¥"
GLUED_UNITS = frozenset(
    names_of("cm mm km kg mg ml mL cl ft yd min hr hrs sec lb lbs oz gal mph kmh kph mi Hz kHz MHz kPa kJ kW mol cc")
)


def scale(word: str) -> int | None:
    """Return the number that a word such as "million" multiplies by."""
    return _SCALES.get(word.lower())


@lru_cache(maxsize=1024)
def read_unit(text: str, *, nouns: bool = True) -> Unit | None:
    """Return the unit that a text consists of, or None.

    Args:
        text: The text after an amount, such as "miles per hour", "m/s^2" or "sq. ft".
        nouns: Accept up to three unknown words, such as "red apples", as a counted noun.
    """
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = text.strip().rstrip(".").replace("{", "").replace("}", "").replace(r"\cdot", "*").replace("$", "$ ")
    text = re.sub(r"°\s*([CF])\b", r"deg\1", text)
    text = re.sub(r"(?i)\bdegrees?\s+(celsius|fahrenheit)\b", r"\1", text)
    known = _read_known(re.sub(r"\bper\b", "/", text))
    if known is not None or not nouns:
        return known
    words = [word.lower() for word in text.replace(".", " ").split()]
    if not 1 <= len(words) <= 3 or not all(re.fullmatch(r"[a-z]+(?:[-'][a-z]+)*", word) for word in words):
        return None
    if any(word in _NO_NOUNS or _singular(word) in _NO_NOUNS or len(word) == 1 for word in words):
        return None
    return Unit(((" ".join([*words[:-1], _singular(words[-1])]), 1),))


def _read_known(text: str) -> Unit | None:
    """Read a product and quotient of known units."""
    parts = re.findall(r"[A-Za-z$€£₹¥¢°Ω]+\.?|\^\s*-?\d+|[*/]|\S", text)
    exponents: dict[str, int] = {}
    factor = Fraction(1)
    sign, power, pending = 1, 1, False
    count = 0
    position = 0
    while position < len(parts):
        part = parts[position].rstrip(".")
        position += 1
        if part in ("*", "/"):
            if pending or (part == "*" and not count):
                return None
            sign, pending = (-1 if part == "/" else 1), True
            continue
        if part.lower() in _POWERS:
            power, pending = _POWERS[part.lower()], True
            continue
        unit = _lookup(part)
        if unit is None:
            return None
        if position < len(parts) and parts[position].startswith("^"):
            power *= int(parts[position][1:])
            position += 1
        elif position < len(parts) and parts[position] in ("squared", "cubed"):
            power *= 2 if parts[position] == "squared" else 3
            position += 1
        if abs(power) > 9:
            return None
        for base, exponent in unit.dimension:
            exponents[base] = exponents.get(base, 0) + sign * power * exponent
        factor *= unit.factor ** (sign * power)
        sign, power, pending = 1, 1, False
        count += 1
    if pending or not count:
        return None
    return Unit(tuple(sorted((base, exponent) for base, exponent in exponents.items() if exponent)), factor)


def _lookup(token: str) -> Unit | None:
    if token.lower() in _COMPOUND:
        return _read_known(_COMPOUND[token.lower()])
    if token in _UNITS:
        return _UNITS[token]
    if len(token) > 2:
        lower = token.lower()
        return _UNITS.get(lower) or _UNITS.get(_singular(lower))
    return None


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word
