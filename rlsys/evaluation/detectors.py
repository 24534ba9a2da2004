"""Detectors of formalistic long-time thinking: reasoning that has the surface of long thought without its function.

The paper names three errors: content repetition, over-reflection and failure to follow the instruction. Each detector
is a formula over one completion. The thresholds are ours; docs/evaluation.md has how often they are met.

Source: Marco-o1 v2, arXiv:2503.01461, table 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from rlsys.evaluation.records import Sample
from rlsys.tasks.answers.extraction import find_answer
from rlsys.tasks.answers.normalise import normalise

LOOP_TIMES = 4
"""Times that the unit of a loop stands in a row."""
LOOP_WORDS = 24
"""Smallest number of words in a loop."""
LONGEST_UNIT = 256
"""Largest number of words in the unit of a loop: a long paragraph."""
NGRAM = 8
REPEATED_SHARE = 0.5
"""Share of repeated n-grams that makes a completion repetitive without an exact loop."""
IDLE_REFLECTIONS = 3
"""Number of reflections without effect that makes a completion over-reflect."""

_CJK = "\u3040-\u30ff\u3400-\u9fff"
_LETTER = rf"[^\W\d_{_CJK}]"
# Of a run of more than 16 letters or digits, each is a word up to the last 16, so that a loop inside the run shows.
# Four equal signs are one word, so that lines and tables of signs are no loops.
_WORD = re.compile(rf"[{_CJK}]|{_LETTER}{{1,16}}(?!{_LETTER})|\d{{1,16}}(?!\d)|\w|([^\w\s])\1{{0,3}}")
_REFLECTION = re.compile(
    r"(?is)<(reflection|double-check)>.*?(?:</\1>|\Z)"
    r"|\b(?:wait|hmm+|alternatively|perhaps|maybe|hold on|on second thought"
    r"|(?:let me|let us|let's|i (?:should|need to|will|have to)) (?:just )?"
    r"(?:re-?(?:check|consider|think|examine|verify|visit|do)|double[- ]check|check (?:again|the result)|verify))\b"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)|\n|(?=<)")
_NUMBER = re.compile(r"-?\d+(?:[.,/]\d+)*")


def words(text: str) -> list[str]:
    """Return the words, numbers and signs of a text, in order.

    A character of a script without spaces is a word.
    """
    return [match[0] for match in _WORD.finditer(text)]


def longest_loop(text: str) -> str:
    """Return the longest loop of a text; "" if it has none.

    Words w_1 ... w_n are a loop where w_i = w_(i-p) for m words in a row, for a unit of p <= LONGEST_UNIT words, if the
    m + p words are at least LOOP_TIMES * p and at least LOOP_WORDS.
    """
    matches = list(_WORD.finditer(text))
    numbers = {word: number for number, word in enumerate({match[0]: None for match in matches})}
    ids = np.array([numbers[match[0]] for match in matches], dtype=np.int32)
    length = start = 0
    for unit in range(1, min(LONGEST_UNIT, len(ids) // LOOP_TIMES) + 1):
        needed = max(LOOP_TIMES * unit, LOOP_WORDS, length + 1) - unit
        equal = ids[unit:] == ids[:-unit]
        if np.count_nonzero(equal) < needed:  # fast, and true for nearly all units
            continue
        breaks = np.flatnonzero(np.diff(np.pad(equal, 1).astype(np.int8)))
        runs = breaks[1::2] - breaks[::2]
        if runs.max() >= needed:
            length, start = int(runs.max()) + unit, int(breaks[2 * runs.argmax()])
    return text[matches[start].start() : matches[start + length - 1].end()] if length else ""


def repeated_ngrams(text: str, size: int = NGRAM) -> float:
    """Return the share of the n-grams of words that occurred before: 1 - distinct n-grams / n-grams.

    Source: seq-rep-n of Welleck et al., arXiv:1908.04319.
    """
    sequence = words(text)
    ngrams = [tuple(sequence[start : start + size]) for start in range(len(sequence) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def reflections(text: str) -> tuple[int, int]:
    """Return the numbers of reflections in a text, and of idle reflections.

    A reflection is a <reflection> or <double-check> node, or a sentence with a marker such as "Wait" or "Perhaps". With
    its text up to the next reflection it is idle if it states no answer, or the answer that the text before it stated
    last. A stated answer is one in the form of a final answer (tag, box, lead-in), or else the last number.
    """
    starts, end = list[int](), 0
    for match in _REFLECTION.finditer(text):
        if match.start() >= end:
            starts.append(match.start())
            end = match.end() if match[1] else _end_of_sentence(text, match.end())
    if not starts:
        return 0, 0
    stated, idle = _stated_answer(text[: starts[0]]), 0
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        answer = _stated_answer(text[start:stop])
        idle += answer is None or answer == stated
        stated = answer or stated
    return len(starts), idle


def _end_of_sentence(text: str, start: int) -> int:
    """Return the end of the sentence that goes on at `start`. A marker alone ("Wait!") does not end one."""
    ends = (stop.end() for stop in _SENTENCE_END.finditer(text, start) if re.search(r"\w", text[start : stop.start()]))
    return next(ends, len(text))


def _stated_answer(text: str) -> str | None:
    answer = find_answer(text)
    if answer is not None and not answer.alone:
        return normalise(answer.text)
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """Signs of formalistic thinking in one completion.

    Attributes:
        repetition: It has a loop, or a share of repeated n-grams of at least REPEATED_SHARE.
        repeated_ngrams: See `repeated_ngrams`.
        reflections: Number of reflections.
        idle_reflections: Number of reflections that do not change the stated answer.
        over_reflection: At least IDLE_REFLECTIONS idle reflections; or, without a valid answer, as many reflections.
        ignored_instruction: The completion was not cut off, its turns were not used up, and the verifier finds no valid
            answer in it.
        loop: The longest loop; "" without one.
    """

    repetition: bool
    repeated_ngrams: float
    reflections: int
    idle_reflections: int
    over_reflection: bool
    ignored_instruction: bool
    loop: str


def signs(sample: Sample) -> Signs:
    """Return the signs of formalistic thinking in a completion."""
    loop, repeated = longest_loop(sample.text), repeated_ngrams(sample.text)
    count, idle = reflections(sample.text)
    unanswered = sample.judged and not sample.answered
    return Signs(
        repetition=bool(loop) or repeated >= REPEATED_SHARE,
        repeated_ngrams=repeated,
        reflections=count,
        idle_reflections=idle,
        over_reflection=idle >= IDLE_REFLECTIONS or (unanswered and count >= IDLE_REFLECTIONS),
        ignored_instruction=unanswered and not (sample.truncated or sample.out_of_turns),
        loop=loop,
    )
