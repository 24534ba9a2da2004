"""Instructions in a prompt that a program can check. The checks are those of the package if-verifiable."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from rlsys.errors import ConfigError, DataError

# Instructions whose checks split a text into sentences or words with data of nltk.
_SPLITTING = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
_SENTENCES = "tokenizers/punkt_tab"


class Instructions:
    """The checks of IFEval, by name.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, field: str) -> None:
        try:
            import langdetect
            from if_verifiable.common import evaluate_instructions
            from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
        except ImportError as error:
            raise ConfigError(
                f"{field}: expected the package if-verifiable, found {error}; install it with "
                "`pip install if-verifiable`"
            ) from None
        langdetect.DetectorFactory.seed = 0  # its guesses are random otherwise
        self._field, self._evaluate, self._checks = field, evaluate_instructions, INSTRUCTION_DICT

    def followed(self, text: str, names: Sequence[str], arguments: Sequence[Any], prompt: str) -> list[bool]:
        """Return whether a text follows each instruction by the strict rules; an empty list if there is no text."""
        results, _ = self._evaluate(text, list(names), list(arguments), prompt, self._checks)
        return [bool(result.strict_pass) for result in results]

    def check_row(self, where: str, names: Any, arguments: Any) -> None:
        """Raise DataError if the instructions of a row cannot be checked."""
        where = f"{self._field}: {where}"
        if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments) or not names:
            raise DataError(f"{where}: expected instruction_id_list and kwargs with one entry for each instruction")
        if unknown := [name for name in names if name not in self._checks]:
            raise DataError(f"{where}: if-verifiable has no check for the instruction {unknown[0]!r}")
        if not all(isinstance(each, dict) for each in arguments):
            raise DataError(f"{where}: expected the arguments of an instruction by name in each entry of kwargs")

    def check_data(self, names: set[str]) -> None:
        """Raise if verifier processes, which do not see the user's home folder, would not find the data of nltk."""
        if not names & _SPLITTING:
            return
        import nltk

        shared = [folder for folder in nltk.data.path if folder != os.path.expanduser("~/nltk_data")]
        try:
            nltk.data.find(_SENTENCES, paths=shared)
        except LookupError:
            folder = os.path.join(sys.prefix, "nltk_data")
            raise ConfigError(
                f"{self._field}: two of its instructions need the data punkt_tab of nltk, found none in {folder}; "
                f"fetch it with `python -m nltk.downloader -d {folder} punkt_tab`"
            ) from None


@cache
def instructions(benchmark: str) -> Instructions:
    """Return the checks for a benchmark, loaded once in a process."""
    return Instructions(f"task.name {benchmark}")


def missed_note(names: Sequence[str], followed: Sequence[bool]) -> str:
    """Return a reason, for people, that names the instructions that were not followed."""
    missed = ", ".join(name for name, good in zip(names, followed, strict=True) if not good)
    return f"not followed: {missed}" if missed else ""
