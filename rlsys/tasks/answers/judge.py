"""Judge of mathematical answers: the answer of a completion against a reference, in layers.

1. The place of the answer (`extraction`); a chain that was cut off has none.
2. The same text after normalisation.
3. The letter of a multiple choice.
4. The same value: numbers, units, lists, sets, intervals, matrices, equations, words (`reader`, `compare`).

Every text must be used whole. What cannot be decided is wrong, and the verdict says why.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from rlsys.tasks.answers.comparing.compare import Comparison
from rlsys.tasks.answers.extraction import Extracted, find_answer
from rlsys.tasks.answers.normalise import normalise
from rlsys.tasks.answers.reading.lexer import FUNCTIONS
from rlsys.tasks.answers.reading.reader import MAX_ANSWER_CHARS, read_answer
from rlsys.tasks.answers.reading.words import choice_letter, chosen_letter, read_any_words, same_words, squeeze
from rlsys.tasks.answers.values import Based, Expr, UndecidableError, UnreadableError, Value, Words, number
from rlsys.tasks.reasons import quoted, read_and_expected
from rlsys.types import Verdict

Strictness = Literal["text", "value", "lenient"]

_CORRECT = Verdict(outcome="ok", reward=1.0, answered=True)
_SHOWN_CHARS = 80
# A whole completion with more words is prose rather than a name.
_NAME_WORDS = 4
_OPERATOR = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")
# Names of environments are no words.
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]+\*?\}")
_WORD = re.compile(rf"(?<![\\a-zA-Z])(?!(?:{'|'.join(FUNCTIONS)})(?![a-zA-Z]))[a-zA-Z]{{3,}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Judge with fixed rules.

    Attributes:
        strictness: "text": the same text after normalisation; "value": the same value; "lenient": see `Comparison`.
        relative_tolerance: see `Comparison`.
        accept_cut_off: Look for an answer in a completion that was cut off at its length limit, too.
    """

    strictness: Strictness = "value"
    relative_tolerance: float = 1e-6
    accept_cut_off: bool = False

    def verdict(self, reference: str, completion: str, finished: bool = True) -> Verdict:
        """Judge a completion.

        Args:
            reference: the reference answer.
            completion: the text of the completion.
            finished: False if the completion was cut off.

        Returns:
            Reward 1 if the answer is the reference, else 0. `answered` is False if there is no valid answer.
        """
        if not finished and not self.accept_cut_off:
            return _no_answer("the completion was cut off")
        answer = find_answer(completion)
        verdict = self._judged(reference, answer)
        if answer is None or verdict.outcome == "ok" or not verdict.answered:
            return verdict
        return replace(verdict, detail=f"{verdict.detail}; {read_and_expected(answer.text, reference)}")

    def _judged(self, reference: str, answer: Extracted | None) -> Verdict:
        """Return the verdict on an answer. Its reason does not quote reference and answer."""
        if answer is None:
            return _no_answer("no <answer>, box or lead-in, and the text is not one value")
        if len(answer.text) > MAX_ANSWER_CHARS:
            return _no_answer(f"the answer has more than {MAX_ANSWER_CHARS} characters")
        if not normalise(answer.text):
            return _no_answer("the answer is empty")
        return self._compared(reference, answer)

    def _compared(self, reference: str, answer: Extracted) -> Verdict:
        texts = normalise(reference), normalise(answer.text)
        if texts[0] and squeeze(texts[0]) == squeeze(texts[1]):
            return _CORRECT
        if self.strictness == "text":
            words, others = (read_any_words(text) for text in texts)
            return _CORRECT if words and others and same_words(words, others) else _wrong("another text")
        if choice_letter(texts[0]) and chosen_letter(texts[1]):
            return _CORRECT if choice_letter(texts[0]) == chosen_letter(texts[1]) else _wrong("another choice")
        reference_value, answer_value = _read(reference), _read(answer.text)
        if (
            isinstance(reference_value, Based) and not isinstance(answer_value, Based) and texts[1].isalnum()
        ):  # digits without a base
            answer_value = Based(texts[1].upper().lstrip("0") or "0", reference_value.base)
        has_words = _WORD.search(_ENVIRONMENT.sub(" ", texts[1])) is not None
        is_prose = isinstance(answer_value, str) and (answer.alone or has_words)
        if isinstance(answer_value, Words):
            is_name = _is_text(reference_value) or (answer_value.letters and _has_symbols(reference_value))
            is_prose = not is_name or (answer.alone and len(answer_value.text.split()) > _NAME_WORDS)
        if is_prose:
            where = "no <answer>, box or lead-in, and the text" if answer.alone else "the answer"
            return _no_answer(f"{where} is not one value: {quoted(answer.text)}")
        return self._valued(reference_value, answer_value, texts)

    def _valued(self, reference: Value | str, answer: Value | str, texts: tuple[str, str]) -> Verdict:
        if isinstance(reference, str) or isinstance(answer, str):
            if isinstance(reference, str):
                return _wrong(f"undecided: the reference can only be compared as text: {reference}")
            return _wrong(f"the answer is not readable: {answer}")
        if _OPERATOR.search(texts[1]):  # a policy would find the integrals that take for ever
            reason = "undecided: only a sum, integral or limit of the reference is evaluated"
            return _CORRECT if reference == answer else _wrong(reason)
        comparison = Comparison(
            relative_tolerance=Fraction(self.relative_tolerance).limit_denominator(10**12),
            lenient=self.strictness == "lenient",
        )
        try:
            return _CORRECT if comparison.same(reference, answer) else _wrong("another value")
        except UndecidableError as error:
            return _wrong(f"undecided: {error}")
        except RecursionError:
            return _wrong("undecided: too many levels")

    def reference_fault(self, reference: str) -> str | None:
        """Return why a reference cannot be verified against itself, or None.

        A reference that is compared as text only has this fault, too, unless it is a text of words.
        """
        for completion in (f"<answer>{reference}</answer>", rf"\boxed{{{reference}}}"):
            verdict = self._judged(reference, find_answer(completion))
            if not verdict.reward:
                return verdict.detail
        if self.strictness == "text":
            return None
        value = _read(reference)
        if not isinstance(value, str):
            try:
                if _OPERATOR.search(reference):  # can it be evaluated?
                    Comparison().same(value, number(1))
                return None if Comparison().same(value, value) else "it is not equal to itself"
            except UndecidableError as error:
                return str(error)
        return f"only as text: {value}"


def _read(text: str) -> Value | str:
    """Return the value of a text, or the reason why it is unreadable."""
    try:
        return read_answer(text)
    except UnreadableError as error:
        return str(error)
    except RecursionError:
        return "too many levels"


def _is_text(value: Value | str) -> bool:
    return isinstance(value, str | Words)


def _has_symbols(value: Value | str) -> bool:
    return isinstance(value, Expr) and bool(value.symbols())


def shortened(text: str) -> str:
    """Return the beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else f"{line[: _SHOWN_CHARS - 1]}…"


def _wrong(detail: str) -> Verdict:
    return Verdict(outcome="wrong", reward=0.0, answered=True, detail=detail)


def _no_answer(detail: str) -> Verdict:
    return Verdict(outcome="wrong", reward=0.0, answered=False, detail=f"no answer: {detail}")
