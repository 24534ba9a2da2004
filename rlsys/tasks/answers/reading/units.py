"""Units of measurement, currencies and counted nouns."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from rlsys.tasks.answers.reading.number_words import NUMBER_WORDS
from rlsys.tasks.answers.values import Unit, names_of

# Base unit, or the units it consists of, and for each unit its factor and its names. Names of at most two letters are
# case-sensitive.
_TABLE: dict[str, dict[str, str]] = {
    "metre": {"1": "m meter metre", "127/5000": "in inch inches", "381/1250": "ft foot feet", "1143/1250": "yd yard",
              "201168/125": "mi mile"},
    "second": {"1": "s sec secs second", "1/1000": "ms millisecond", "60": "min mins minute", "3600": "h hr hrs hour",
               "86400": "day", "604800": "week"},
    "month": {"1": "month", "12": "yr yrs year"},
    "gram": {"1": "g gram gramme", "1000": "kgs kilo", "1000000": "tonne", "45359237/100000": "lb lbs pound",
             "45359237/1600000": "oz ounce"},
    "dm^3": {"1": "L l liter litre", "473176473/1000000000": "pint", "473176473/500000000": "quart",
             "473176473/125000000": "gal gallon", "473176473/2000000000": "cup",
             "473176473/32000000000": "tbsp tablespoon", "157725491/32000000000": "tsp teaspoon"},
    "dollar": {"1": "$ dollar usd buck", "1/100": "cent ¢"},
    "euro": {"1": "€ euro eur"}, "british pound": {"1": "£ gbp"}, "rupee": {"1": "₹ rupee inr rs"},
    "yen": {"1": "¥ yen jpy"},
    "degree": {"1": "° degree deg"}, "radian": {"1": "rad radian"},
    "celsius": {"1": "degC celsius"}, "fahrenheit": {"1": "degF fahrenheit"}, "kelvin": {"1": "K kelvin"},
    "kg*m/s^2": {"1": "N newton"}, "N*m": {"1": "J joule"}, "J/s": {"1": "W watt"}, "N/m^2": {"1": "Pa pascal"},
    "s^-1": {"1": "Hz hertz"}, "volt": {"1": "V volt"}, "ampere": {"1": "A amp ampere"}, "ohm": {"1": "Ω ohm"},
    "mole": {"1": "mol mole"}, "unit": {"1": "unit"},
    "mi/h": {"1": "mph"}, "km/h": {"1": "kmh kph kmph"}, "ft/s": {"1": "fps"}, "cm^3": {"1": "cc"},
    "ft^2": {"1": "sqft", "43560": "acre"}, "m^2": {"10000": "ha hectare"},
}  # fmt: skip
_PREFIXES = {"k kilo": "1000", "M mega": "1000000", "d deci": "1/10", "c centi": "1/100", "m milli": "1/1000"}
_PREFIXED = names_of(
    "m meter metre g gram gramme L l liter litre N newton J joule W watt Pa pascal Hz hertz V volt A ampere"
)
CURRENCIES = "$€£₹¥"
GLUED_UNITS = frozenset(
    names_of(
        "dm cm mm km kg kgs mg ml mL cl ft yd min hr hrs sec lb lbs oz gal mph kmh kph mi Hz kHz MHz kPa kJ kW mol cc"
    )
)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_FACTOR = re.compile(
    r"\s*(?P<sign>[*/])?\s*(?:(?P<before>square|sq|cubic|cu)\b\.?\s*)?(?P<name>[A-Za-z]+|[$€£₹¥¢°Ω])\.?"
    r"\s*(?:\^\s*(?P<exponent>-?\d)(?!\d)|(?P<after>squared|cubed)\b)?\s*",
    re.IGNORECASE,
)
# Plurals without an s, and words that take the place of a noun.
_PLURALS = frozenset(names_of("people children men women feet teeth mice geese fish sheep deer dice total altogether"))
# A text with one of these words is more than an amount of a counted noun.
NO_NOUNS = NUMBER_WORDS | frozenset(
    names_of(
        "a about above add all almost also always and approximately around as at base basis below besides between "
        "bound but by couple divided does double doubled either else equal equals error even exactly except exists "
        "fails false few fewer from greater gross guess has if incorrect instead invalid inverse is it its less "
        "likely lower maximum maybe means minimum minus mod modulo more most multiplied nearly negative neither never "
        "no none nor not odd off only opposite or other otherwise over pair per percent percentage perhaps plus "
        "possible possibly power probably reciprocal respectively root roughly score so sometimes squared sum than "
        "the then though thus times to too triple twice under unless until upper upwards versus vs was when where "
        "whereas which while without works wrong yes yet"
    )
)
_NO_NOUN = re.compile(r".|.*(?:n't|ly|ish|like)")
_UNITS: dict[str, Unit] = {}
# Names of the units that have a letter.
_NAMES: dict[str, str] = {}


@lru_cache(maxsize=1024)
def read_unit(text: str, *, nouns: bool = True) -> Unit | None:
    """Return the unit that a text consists of, or None.

    Args:
        text: The text after an amount, such as "miles per hour", "m/s^2" or "sq. ft".
        nouns: Accept up to three unknown words, such as "red apples", as a counted noun.
    """
    text = text.replace(r"\Omega", "Ω")
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = text.strip().rstrip(".").replace("{", "").replace("}", "").replace("$", "$ ")
    text = re.sub(r"°\s*([CF])\b", r"deg\1", text)
    text = re.sub(r"(?i)\bdegrees?\s+(celsius|fahrenheit)\b", r"\1", text)
    known = _read_known(re.sub(r"\bper\b|(?<=\w)\s+an?\b", "/", text))
    if known is not None or not nouns:
        return known
    words = text.lower().replace(".", " ").split()
    if not 1 <= len(words) <= 3 or not all(re.fullmatch(r"[a-z]+(?:[-'][a-z]+)*", word) for word in words):
        return None
    if any(word in NO_NOUNS or _singular(word) in NO_NOUNS or _NO_NOUN.fullmatch(word) for word in words):
        return None
    counted = any(word in _PLURALS or _singular(word) != word for word in words)
    return Unit(((" ".join(map(_singular, words)), 1),), counted=counted)


def same_dimension(one: Unit, other: Unit) -> bool:
    """Return whether amounts of two units can be compared: "red apples" and "apples" can."""
    nouns = [{word for name, _ in unit.dimension for word in name.split()} for unit in (one, other)]
    single = all(unit.dimension and unit.dimension[0][1] == 1 == len(unit.dimension) for unit in (one, other))
    return one.dimension == other.dimension or (single and (nouns[0] <= nouns[1] or nouns[1] <= nouns[0]))


def _read_known(text: str) -> Unit | None:
    """Read a product and quotient of known units."""
    exponents: dict[str, int] = {}
    factor, place = Fraction(1), 0
    while place < len(text):
        match = _FACTOR.match(text, place)
        unit = _lookup(match["name"].rstrip(".")) if match else None
        if match is None or unit is None or (match["sign"] == "*" and not place):
            return None
        power = _POWERS.get((match["before"] or match["after"] or "").lower(), 1) * int(match["exponent"] or 1)
        power *= -1 if match["sign"] == "/" else 1
        for base, exponent in unit.dimension:
            exponents[base] = exponents.get(base, 0) + power * exponent
        factor *= unit.factor**power
        place = match.end()
    return Unit(tuple(sorted(pair for pair in exponents.items() if pair[1])), factor) if place else None


def _lookup(name: str) -> Unit | None:
    if name in _UNITS or len(name) <= 2:
        return _UNITS.get(name)
    return _UNITS.get(name.lower()) or _UNITS.get(_singular(name.lower()))


def name_of_letter(letter: str) -> str | None:
    """Return the name of the unit that a letter stands for, such as "meter" for "m"."""
    return _NAMES.get(letter)


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if re.fullmatch(".+[^sui]s", word) else word


def _fill() -> None:
    for base, factors in _TABLE.items():
        whole = _read_known(base) or Unit(((base, 1),))
        for factor, names in factors.items():
            for name in names.split():
                if len(name) == 1:
                    _NAMES[name] = max(names.split(), key=len)
                _UNITS[name] = Unit(whole.dimension, whole.factor * Fraction(factor))
                for prefix, power in _PREFIXES.items() if name in _PREFIXED else ():
                    if prefix in ("d deci", "c centi") and base not in ("metre", "dm^3"):
                        continue
                    spelled = prefix.split()[len(name) > 2] + name
                    _UNITS[spelled] = Unit(whole.dimension, whole.factor * Fraction(factor) * Fraction(power))


_fill()
SYMBOL_UNITS = frozenset(name for name in _UNITS if len(name) == 1 and name.isalpha())
