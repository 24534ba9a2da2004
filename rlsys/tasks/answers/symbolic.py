"""Sums, products, integrals and limits of a reference, which math-verify reads and compares.

Only the operator of a reference is evaluated. That of an answer is compared with it as it is written, because a policy
would find the integrals that take for ever.

math-verify reads "17 18" as 35, stops at words and runs without a bound. So a text gets here only if it has such an
operator, no words and only small numbers, and if the parser has used all of it. The time limits of math-verify use
SIGALRM, which works only on a main thread, so they are switched off. Call it only in a process that has a deadline.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

# math-verify warns once that the caller must provide the time limit; the module docstring requires it.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_CHARS = 120
_OPERATOR = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")
_KNOWN = re.compile(
    r"\\(?:sum|prod|int|lim|to|infty|frac|sqrt|cdot|times|pi|sin|cos|tan|ln|log|exp|alpha|beta|gamma|theta|lambda|rightarrow|"
    r"le|ge|ne|in|pm)(?![a-zA-Z])"
)
# Two letters are a product or a differential, three may be a word.
_REFUSED = re.compile(r"\\|[a-zA-Z]{3}|\d\s+[\d.]|\d{5}|\^\s*\{?\s*\d{3}|\^[^^=]*\^[^^=]*\^|!|[a-zA-Z]_|[^\x00-\x7f]")
_DIGITS = 12


def same(reference: str, answer: str) -> bool | None:
    """Return whether two normalised texts have the same value, or None if math-verify cannot decide.

    The reference must have a sum, product, integral or limit. An answer that has one must be the same expression.
    """
    if not _OPERATOR.search(reference):
        return None
    if not (_is_bounded(reference) and _is_bounded(answer)):
        return None
    values = _parse(reference), _parse(answer)
    if None in values:
        return None
    if _OPERATOR.search(answer):
        return bool(values[0] == values[1])
    from math_verify import verify

    return bool(verify(*values, float_rounding=_DIGITS, numeric_precision=2 * _DIGITS, timeout_seconds=None))


def is_admissible(text: str) -> bool:
    """Return whether a normalised text is given to math-verify."""
    return bool(_OPERATOR.search(text)) and _is_bounded(text)


def _is_bounded(text: str) -> bool:
    return len(text) <= MAX_CHARS and len(_OPERATOR.findall(text)) <= 1 and not _REFUSED.search(_KNOWN.sub(" ", text))


@lru_cache(maxsize=256)
def _parse(text: str) -> Any:
    """Return the expression of a text that the parser uses to its end, else None."""
    # Loaded here, because few answers need it and it takes a second.
    from antlr4 import Token
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    try:
        parser = _Latex2Sympy().create_parser(text)
        parser.math()
        if parser.getTokenStream().LA(1) != Token.EOF:
            return None
        config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=NormalizationConfig())
        values = parse(rf"\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
    except Exception:  # noqa: BLE001 - the parser raises bare exceptions; the text stays undecided
        return None
    return values[0] if len(values) == 1 else None
