"""Task with the generated problems of the package reasoning-gym, which its own scorers judge.

Source: Stojanovski et al., Reasoning Gym, arXiv:2505.24760.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import io
import json
import warnings
from functools import cached_property
from typing import Any

from rlsys.config.outside_tasks import ReasoningGymConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tables.messages import with_system_prompt, with_template
from rlsys.tasks.answers.extraction import find_answer
from rlsys.tasks.base import BaseTask
from rlsys.tasks.generated import hashed_random, wrong
from rlsys.tasks.reasons import read_and_expected
from rlsys.types import Problem, Split, Verdict

# A data set gives the item i of seed s the generator of s + i, so seeds are hashed, and indices stay below this number.
_BLOCK = 500
_BLOCKS_KEPT = 64
_DRAWS = 200
_OTHER_PROBLEMS = "has other problems or reference answers in every process: to resume a run, set PYTHONHASHSEED"
FAULTS = {
    "codeio": "runs programs of the package while it draws problems, and some of them write files",
    "game_of_life_halting": "has a scorer that accepts every answer",
    **dict.fromkeys(("isomorphic_strings", "knight_swap", "polynomial_multiplication"), _OTHER_PROBLEMS),
    **dict.fromkeys(("ransom_note", "word_ladder"), _OTHER_PROBLEMS),
}
"""What is wrong with data sets of version 0.1.25."""
RUNS_ANSWERS = (
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24"),
    *("simple_integration", "spiral_matrix", "string_insertion"),
)
"""Data sets whose scorers give an answer to Python's eval, or to sympy's parser, which uses it."""


class ReasoningGymTask(BaseTask):
    """Problems of one or several data sets. The reward is the score; an answer is right if the score is 1.

    The splits have seeds of their own. A training problem whose question is held out is drawn again. A problem carries
    the whole entry of its data set, so that a verifier process generates nothing.
    """

    one_answer = False

    def __init__(self, config: ReasoningGymConfig, seed: int) -> None:
        self.config = config
        self._seed = seed if config.seed is None else config.seed
        self._scorers = {name: _create(name, each.arguments, seed=0, size=1) for name, each in config.datasets.items()}
        self._blocks: dict[tuple[str, Split, int, int], Any] = {}

    def size(self, split: Split) -> int | None:
        return self.config.size if split == "train" else self.config.held_out_size

    def problem(self, split: Split, index: int) -> Problem:
        name, entry = self._entry(split, index)
        question = with_template(entry["question"], self.config.prompt_template)
        given = {key: _plain(entry[key]) for key in ("question", "answer", "metadata")}
        text = repr(given)
        if not _is_exact(text, given):
            raise DataError(f"task.datasets.{name}: its problem {index} has values that no verifier process can get")
        return Problem(
            problem_id=f"{split}-{index}",
            question=with_system_prompt(question, self.config.system_prompt),
            answer="" if entry["answer"] is None else str(entry["answer"]),
            metadata={
                "source_dataset": name,
                "question": entry["question"],
                "metadata": json.loads(json.dumps(given["metadata"], default=str)),
                "entry": text,  # JSON would turn tuples into lists, and the scorers of some data sets compare tuples
            },
        )

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Return the score of the answer, which stands in a tag, in a box or after a lead-in (docs/answers.md)."""
        if not finished:
            return wrong("no answer: the completion was cut off", answered=False)
        answer = find_answer(completion)
        if answer is None or answer.alone or not answer.text:
            return wrong("no answer: no <answer>, box or lead-in", answered=False)
        scorer = self._scorers[problem.metadata["source_dataset"]]
        try:
            score = float(scorer.score_answer(answer.text, ast.literal_eval(problem.metadata["entry"])))
        except Exception as error:  # noqa: BLE001 - some scorers raise on answers that they cannot read
            return wrong(f"its scorer raised {type(error).__name__}: {error}")
        if score >= 1:
            return Verdict(outcome="ok", reward=score, answered=True)
        detail = f"score {score:g}: {read_and_expected(answer.text, problem.answer)}"
        return Verdict(outcome="wrong", reward=score, answered=True, detail=detail)

    def notes(self) -> tuple[str, ...]:
        notes = [f"task.datasets: {name} {FAULTS[name]}" for name in self.config.datasets if name in FAULTS]
        if running := [name for name in self.config.datasets if name in RUNS_ANSWERS]:
            notes.append(f"task.datasets: scorers run answers as Python code (docs/security.md): {', '.join(running)}")
        return tuple(notes)

    def digest(self) -> str:
        """Return the sha256 of the held-out problems and of the version of the package."""
        version = importlib.metadata.version("reasoning-gym")
        return hashlib.sha256(json.dumps([version, self._held_out]).encode()).hexdigest()

    @cached_property
    def _held_out(self) -> list[tuple[str, str]]:
        """The held-out questions and answers."""
        entries = (self._entry("held_out", index)[1] for index in range(self.config.held_out_size))
        return [(entry["question"], str(entry["answer"])) for entry in entries]

    @cached_property
    def _held_out_questions(self) -> frozenset[str]:
        return frozenset(question for question, _ in self._held_out)

    def _entry(self, split: Split, index: int) -> tuple[str, dict[str, Any]]:
        """Draw the entry of a problem, and the name of its data set."""
        names = list(self.config.datasets)
        weights = [each.weight for each in self.config.datasets.values()]
        for draw in range(_DRAWS):
            [name] = hashed_random(self._seed, split, index, draw).choices(names, weights)
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):  # some print
                entry = self._block(name, split, index // _BLOCK, draw)[index % _BLOCK]
            if split == "held_out" or entry["question"] not in self._held_out_questions:
                return name, entry
        raise ConfigError(
            f"task.datasets: {_DRAWS} draws of {', '.join(names)} gave held-out questions only; lower "
            f"task.held_out_size {self.config.held_out_size}, or choose arguments with more problems"
        )

    def _block(self, name: str, split: Split, number: int, draw: int) -> Any:
        """Return the data set with the problems from `number` times `_BLOCK` on."""
        key = (name, split, number, draw)
        if key not in self._blocks:
            if len(self._blocks) >= _BLOCKS_KEPT:
                self._blocks.clear()
            seed = hashed_random(self._seed, *key).getrandbits(31)
            self._blocks[key] = _create(name, self.config.datasets[name].arguments, seed=seed, size=_BLOCK)
        return self._blocks[key]


def _create(name: str, arguments: dict[str, Any], *, seed: int, size: int) -> Any:
    """Return a data set of the package.

    Raises:
        ConfigError: there is no such package or data set, or it refuses the arguments.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of modules that it imports
            from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError(
            f"task.type reasoning_gym: expected the package reasoning-gym, found {error}; install it with "
            "`pip install reasoning-gym`"
        ) from None
    if name not in DATASETS or name == "composite":
        close = difflib.get_close_matches(name, sorted(set(DATASETS) - {"composite"}))
        hint = f"did you mean {' or '.join(close)}?" if close else "docs/tasks.md lists them"
        raise ConfigError(f"task.datasets: reasoning-gym has no data set {name!r} of problems; {hint}")
    try:
        return create_dataset(name, seed=seed, size=size, **arguments)
    except Exception as error:  # noqa: BLE001 - the package checks arguments with errors of many kinds
        known = [each.name for each in dataclasses.fields(DATASETS[name][1]) if each.name not in ("seed", "size")]
        raise ConfigError(
            f"task.datasets.{name}.arguments: {type(error).__name__}: {error}; the arguments are {', '.join(known)}"
        ) from None


def _plain(value: Any) -> Any:
    """Return a value with Python's own types in place of those of numpy and of other classes derived from them."""
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(map(_plain, value))
    if isinstance(value, str):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def _is_exact(text: str, value: Any) -> bool:
    try:
        return bool(ast.literal_eval(text) == value)
    except (ValueError, SyntaxError):
        return False
