"""Verifier of mathematical answers with math-verify: extraction from free text, then symbolic comparison.

The time limits of math-verify use SIGALRM, which works only on a main thread, so they are switched off here. A formula
such as 9**9**9**9 can run forever. Call `judge` only in a process that has a deadline.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import parse
from math_verify import verify as equal

from rlsys.tasks.tags import final_answer
from rlsys.types import Verdict

# Enough for the last page of a proof. The time of the extraction's regular expressions is not linear in the text.
MAX_COMPLETION_CHARS = 8192
MAX_ANSWER_CHARS = 1024

_MARKED = re.compile(r"\\boxed|(?<!\\)\$|\\\(|\\\[")
# Read as LaTeX, "18 dollars" and "1 000" would be products of letters and digits.
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|\d \d")

# math-verify warns once that the caller must provide the time limit; the module docstring requires it.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def judge(reference: str, completion: str) -> Verdict:
    """Compare the final answer of a completion with the reference answer.

    The final answer is the only `<answer>` node of the completion (`tags.final_answer`). If the completion has no such
    tag, math-verify searches it for a boxed answer, other LaTeX, or the last plain number.

    Returns:
        Reward 1 if the answers are the same text or mathematically equal, else 0. `answered` is False if no answer
        could be extracted.
    """
    if not any(tag in completion for tag in ("<answer>", "</answer>")):
        return _compare(reference, _extract(completion[-MAX_COMPLETION_CHARS:]))
    text = final_answer(completion)
    if not text or len(text) > MAX_ANSWER_CHARS:
        return _NO_ANSWER
    if _same_text(reference, text):
        return _CORRECT
    if not read_answer(reference):  # the reference is a text such as "yes", so any text is an answer
        return _WRONG
    return _compare(reference, read_answer(text))


def _compare(reference: str, answer: tuple[Any, ...]) -> Verdict:
    if not answer:
        return _NO_ANSWER
    same = equal(list(read_answer(reference)), list(answer), timeout_seconds=None)
    return _CORRECT if same else _WRONG


@lru_cache(maxsize=256)
def read_answer(text: str) -> tuple[Any, ...]:
    """Parse a text that consists of an answer only. Return () if it is not mathematics."""
    text = text.strip().removesuffix(".")
    if not text or _MARKED.search(text) or _PROSE.search(text):
        return _extract(text)
    return _extract(rf"\boxed{{{text}}}")


def _extract(text: str) -> tuple[Any, ...]:
    return tuple(parse(text, parsing_timeout=None))


def _same_text(left: str, right: str) -> bool:
    return " ".join(left.split()).casefold() == " ".join(right.split()).casefold()


_CORRECT = Verdict(outcome="ok", reward=1.0, answered=True)
_WRONG = Verdict(outcome="wrong", reward=0.0, answered=True)
_NO_ANSWER = Verdict(outcome="wrong", reward=0.0, answered=False, detail="no answer could be extracted")
