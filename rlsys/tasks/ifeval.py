"""IFEval: instructions in a prompt that a program can check. The checks are those of the package if-verifiable.

Source: Zhou et al., Instruction-Following Evaluation for Large Language Models, arXiv:2311.07911.
"""

from __future__ import annotations

import os
import sys
from functools import cached_property
from typing import Any

from rlsys.config.outside_tasks import BenchmarkConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tasks.benchmarks import BenchmarkTask
from rlsys.tasks.columns import Example
from rlsys.tasks.dataset import Data
from rlsys.types import Problem, Verdict

# Instructions whose checks split a text into sentences or words with data of nltk.
_SPLITTING = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
_SENTENCES = "tokenizers/punkt_tab"


class IfevalTask(BenchmarkTask):
    """Task whose reward is the share of the instructions that a completion follows. It is right if it follows all."""

    one_answer = False

    def __init__(self, config: BenchmarkConfig, seed: int) -> None:
        super().__init__(config, seed)
        # At the start, so that no verification has to wait for the imports.
        try:
            import langdetect
            from if_verifiable.common import evaluate_instructions
            from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
        except ImportError as error:
            raise ConfigError(
                f"task.name ifeval: expected the package if-verifiable, found {error}; install it with "
                "`pip install if-verifiable`"
            ) from None
        langdetect.DetectorFactory.seed = 0  # its guesses are random otherwise
        self._evaluate, self._checks = evaluate_instructions, INSTRUCTION_DICT

    def notes(self) -> tuple[str, ...]:
        return self._data.notes

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Return the share of instructions that are followed, by the strict rules."""
        if not finished and not self.config.accept_cut_off:
            return Verdict(outcome="wrong", reward=0.0, answered=False, detail="no answer: the completion was cut off")
        row = problem.metadata
        names, arguments = row["instruction_id_list"], row["kwargs"]
        results, scores = self._evaluate(completion, names, arguments, row["prompt"], self._checks)
        if not results:
            return Verdict(outcome="wrong", reward=0.0, answered=False, detail="no answer: it is empty")
        share = float(scores.partial_strict)
        missed = ", ".join(result.instruction_id for result in results if not result.strict_pass)
        detail = f"not followed: {missed}" if missed else ""
        return Verdict(outcome="wrong" if missed else "ok", reward=share, answered=True, detail=detail)

    @cached_property
    def _data(self) -> Data:
        data = super()._data
        for example in data.train + data.held_out:
            self._check(example)
        names = {name for example in data.train + data.held_out for name in example.columns["instruction_id_list"]}
        if names & set(_SPLITTING):
            _check_sentences()
        return data

    def _check(self, example: Example) -> None:
        """Raise DataError if the instructions of a row cannot be checked."""
        names: Any = example.columns.get("instruction_id_list")
        arguments: Any = example.columns.get("kwargs")
        where = f"task.name ifeval: row {example.number}"
        if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments) or not names:
            raise DataError(f"{where}: expected instruction_id_list and kwargs with one entry for each instruction")
        if unknown := [name for name in names if name not in self._checks]:
            raise DataError(f"{where}: if-verifiable has no check for the instruction {unknown[0]!r}")
        if not all(isinstance(each, dict) for each in arguments):
            raise DataError(f"{where}: expected the arguments of an instruction by name in each entry of kwargs")


def _check_sentences() -> None:
    """Raise if verifier processes, which do not see the user's home folder, would not find the data of nltk."""
    import nltk

    shared = [folder for folder in nltk.data.path if folder != os.path.expanduser("~/nltk_data")]
    try:
        nltk.data.find(_SENTENCES, paths=shared)
    except LookupError:
        folder = os.path.join(sys.prefix, "nltk_data")
        raise ConfigError(
            f"task.name ifeval: two of its instructions need the data punkt_tab of nltk, found none in {folder}; fetch "
            f"it with `python -m nltk.downloader -d {folder} punkt_tab`"
        ) from None
