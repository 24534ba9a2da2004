"""Task that a user wrote: found by its name, checked, and wrapped so that its faults name the field of the config."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import sys
import traceback
from pathlib import Path
from typing import Any

from rlsys.config.outside_tasks import CustomConfig
from rlsys.errors import ConfigError, RlsysError
from rlsys.plugins import load_plugin
from rlsys.types import Message, Problem, Question, Split, StepVerdict, Verdict

# Problems of each split that are compared at the start.
_COMPARED = 200
_METHODS: dict[str, tuple[Any, ...]] = {
    "size": ("train",),
    "problem": ("train", 0),
    "verify": (None, "", True),
    "check_steps": ("", ""),
    "demonstration": (0, None),
    "digest": (),
    "notes": (),
    "vocabulary": (),
}
"""Methods of a task, each with as many arguments as it gets."""


class CustomTask:
    """A user's task. Its methods are called as those of any task, and what they return is checked.

    Args:
        config: the section `task`.
        seed: run.seed.
        folder: see `load_plugin`.

    Raises:
        ConfigError: there is no such task, or it lacks a method.
    """

    def __init__(self, config: CustomConfig, seed: int, folder: str) -> None:
        self._given = (config, seed, folder)
        self._name = f"task.fn {config.fn!r}"
        self._task = self._make()
        for method, arguments in _METHODS.items():
            self._check_method(method, arguments)

    def __reduce__(self) -> Any:
        return CustomTask, self._given  # the module of a file cannot be imported by its name elsewhere

    @property
    def one_answer(self) -> bool:
        return bool(getattr(self._task, "one_answer", False))

    def size(self, split: Split) -> int | None:
        size, least = self._call("size", split), 1 if split == "held_out" else 0
        if size is None or (type(size) is int and size >= least):
            return size
        raise ConfigError(f"{self._name}: size({split!r}): expected None or a number of problems, found {size!r}")

    def problem(self, split: Split, index: int) -> Problem:
        problem = self._call("problem", split, index)
        if fault := _fault_of(problem):
            raise ConfigError(f"{self._name}: problem({split!r}, {index}): expected {', found '.join(fault)}")
        return problem

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        return self._task.verify(problem, completion, finished)  # a verifier process turns its faults into verdicts

    def check_steps(self, question: Question, completion: str) -> StepVerdict | None:
        return self._task.check_steps(question, completion)

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
        shown = self._call("demonstration", index, rng)
        is_pair = isinstance(shown, tuple) and len(shown) == 2 and isinstance(shown[1], str) and not _fault_of(shown[0])
        if shown is not None and not is_pair:
            raise ConfigError(
                f"{self._name}: demonstration({index}): expected None or (Problem, text), found {str(shown)[:100]}"
            )
        return shown

    def digest(self) -> str:
        """Return the sha256 of the plug-in's file and of what the task read."""
        config, _, folder = self._given
        source = config.fn.partition(":")[0]
        file = str(Path(folder) / source) if source.endswith(".py") else getattr(sys.modules[source], "__file__", None)
        code = Path(file).read_bytes() if file else b""
        return hashlib.sha256(code + b"\0" + str(self._call("digest")).encode()).hexdigest()

    def notes(self) -> tuple[str, ...]:
        """Return the task's notes, and one about training questions that are held out.

        Raises:
            ConfigError: a second instance of the task has other problems.
        """
        notes = self._texts("notes")
        other = CustomTask(*self._given)
        splits: tuple[Split, Split] = ("train", "held_out")
        for split in splits:
            if self._questions(split, 1) != other._questions(split, 1):
                raise ConfigError(
                    f"{self._name}: problem({split!r}, 0): expected a function of seed, split and index, because "
                    "verifier processes build the task again; found two questions"
                )
        held_out = set(self._questions("held_out", _COMPARED))
        train = self._questions("train", _COMPARED)
        if repeated := sum(question in held_out for question in train):
            first = f"the first {len(train)} training questions"
            notes += (f"{self._name}: {repeated} of {first} are also held out, so held-out figures will be too high",)
        return notes

    def vocabulary(self) -> tuple[str, ...]:
        return self._texts("vocabulary")

    def _texts(self, method: str) -> tuple[str, ...]:
        texts = self._call(method)
        if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{self._name}: {method}(): expected a tuple of texts, found {str(texts)[:100]}")
        return tuple(texts)

    def _make(self) -> Any:
        config, seed, folder = self._given
        make = load_plugin(config.fn, folder, "task.fn")
        arguments = {**config.arguments, "seed": seed}
        if not callable(make):
            raise ConfigError(f"{self._name}: expected a class or a function, found {type(make).__name__}")
        try:
            inspect.signature(make).bind(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"{self._name}: expected something to call with task.arguments and seed, as in "
                f"{config.fn.rpartition(':')[2]}({', '.join(f'{name}=...' for name in arguments)}): {error}"
            ) from None
        return self._guarded("", make, arguments)

    def _check_method(self, name: str, arguments: tuple[Any, ...]) -> None:
        method = getattr(self._task, name, None)
        if not callable(method):
            raise ConfigError(
                f"{self._name}: {type(self._task).__name__} has no method {name}; derive it from "
                "rlsys.tasks.base.BaseTask, which has all but problem and verify"
            )
        try:
            inspect.signature(method).bind(*arguments)
        except TypeError as error:
            raise ConfigError(
                f"{self._name}: {name} gets {len(arguments)} arguments, as in rlsys.tasks.base.BaseTask: {error}"
            ) from None

    def _questions(self, split: Split, count: int) -> list[Question]:
        size = self.size(split)
        return [self.problem(split, index).question for index in range(count if size is None else min(count, size))]

    def _call(self, name: str, *arguments: Any) -> Any:
        call = f"{name}({', '.join(repr(each) for each in arguments if isinstance(each, str | int))})"
        return self._guarded(f" {call}", lambda: getattr(self._task, name)(*arguments), {})

    def _guarded(self, call: str, function: Any, arguments: dict[str, Any]) -> Any:
        try:
            return function(**arguments)
        except RlsysError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if place.filename == __file__ else f" ({Path(place.filename).name}:{place.lineno})"
            raise ConfigError(f"{self._name}:{call} raised {type(error).__name__}: {error}{where}") from error


def _fault_of(problem: Any) -> tuple[str, str] | None:
    """Return what was expected of a problem and what was found, or None if it can be used."""
    if not isinstance(problem, Problem):
        return "a Problem (rlsys.types)", type(problem).__name__
    for name in ("problem_id", "answer"):
        if not isinstance(value := getattr(problem, name), str):
            return f"text as {name}", repr(value)[:80]
    question = problem.question
    messages = question if isinstance(question, tuple) and question else (question,)
    if not isinstance(question, str) and not all(isinstance(message, Message) for message in messages):
        return "a text or a tuple of Message as question", repr(question)[:80]
    try:
        json.dumps(dict(problem.metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        return "JSON values in metadata, because verifiers run in other processes", str(error)
    return None
