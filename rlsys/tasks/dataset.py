"""Task with problems from a file or data set. `rlsys.tasks.answers` judges the answers."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import ClassVar

from rlsys.config.tasks import DatasetConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tables.messages import question_texts
from rlsys.tables.sources import Source, read_source
from rlsys.tasks.answers.judge import Judge
from rlsys.tasks.answers.references import reference_note
from rlsys.tasks.columns import Example, find_columns
from rlsys.tasks.tags import tag_strings
from rlsys.types import Problem, Question, Split, Verdict

# Number of unreadable rows that a message lists.
_EXAMPLES = 3
Read = Callable[[str, str, str, str | None], Source]
"""A function with the arguments of `rlsys.tables.sources.read_source`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The rows of both splits, and what to tell the user about the others."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    notes: tuple[str, ...]


class DatasetTask:
    """Task with the rows of a data set in file order.

    Rows are read on first use, so a reward process, which only verifies, never loads them. A training row with a
    held-out question is left out, so the splits are disjoint.
    """

    one_answer = True
    fields: ClassVar[tuple[str, str]] = ("task.path", "task.held_out_path")
    """Fields of the config that name the training data and the held-out data."""

    def __init__(self, config: DatasetConfig, seed: int) -> None:
        self.config = config
        self._judge = Judge(
            strictness=config.strictness,
            relative_tolerance=config.relative_tolerance,
            accept_cut_off=config.accept_cut_off,
        )

    def digest(self) -> str:
        """Return the sha256 of all rows that are used, of both splits."""
        rows = [list(map(astuple, split)) for split in (self._data.train, self._data.held_out)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def notes(self) -> tuple[str, ...]:
        """Return lines about the rows that were left out, and about references that cannot be verified."""
        notes = list(self._data.notes)
        if self.config.answer_column is None:
            return (*notes, "task.answer_column null: a completion counts as right if its reward is above 0")
        (train_field, held_out_field), train, held_out = self.fields, self._data.train, self._data.held_out
        fields = {train_field: train, held_out_field: held_out}
        if train and self.config.held_out_path is None:
            fields = {train_field: train + held_out}
        for field, examples in fields.items():
            note = reference_note(self._judge, [(example.number, example.answer) for example in examples])
            notes += [f"{field}: {note}"] if note else []
        return tuple(notes)

    def size(self, split: Split) -> int:
        return len(self._examples(split))

    def problem(self, split: Split, index: int) -> Problem:
        """Return the index-th readable row of a split. Its id has the line number (JSONL) or row number.

        Raises:
            IndexError: The index is outside [0, size).
        """
        example = self._example(split, index)
        return Problem(
            problem_id=f"{split}/{example.number}",
            question=example.question,
            answer=example.answer,
            metadata=example.columns,
        )

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Judge the answer of a completion. Without a reference, `rlsys.rewards` decides whether it is right."""
        if self.config.answer_column is None:
            return Verdict(outcome="ok", reward=0.0, answered=finished and bool(completion.strip()))
        return self._judge.verdict(problem.answer, completion, finished)

    def check_steps(self, question: Question, completion: str) -> None:
        """Return None: the rows have no rules for steps."""

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
        text = self._example("train", index).demonstration
        return None if text is None else (self.problem("train", index), text)

    def vocabulary(self) -> tuple[str, ...]:
        """Return the thought tags and the sorted characters of all texts, for a character tokenizer."""
        examples = self._data.train + self._data.held_out
        characters = set[str]()
        for example in examples:
            characters.update(*question_texts(example.question), example.answer, example.demonstration or "")
        return (*tag_strings(), *sorted(characters))

    @cached_property
    def _data(self) -> Data:
        return load_splits(self.config, self.fields)

    def _examples(self, split: Split) -> tuple[Example, ...]:
        return self._data.train if split == "train" else self._data.held_out

    def _example(self, split: Split, index: int) -> Example:
        if index < 0:
            raise IndexError(f"{split} problem {index}: expected an index of at least 0")
        return self._examples(split)[index]


def load_held_out(config: DatasetConfig, field: str, read: Read = read_source) -> Data:
    """Read a data set without training rows: all rows of `config.path` are held out.

    Args:
        field: field of the user's config that names the data set.
        read: reads the rows.
    """
    source = read(config.path, config.split, field, config.subset)
    examples, skipped = _read_examples(source, config, field)
    notes = _note(field, source, skipped) + _conflicts(field, examples)
    return Data(train=(), held_out=examples, notes=notes)


def load_splits(config: DatasetConfig, fields: tuple[str, str], read: Read = read_source) -> Data:
    """Read both splits, and raise ConfigError or DataError if the data set cannot be used.

    Args:
        fields: fields of the user's config that name the training data and the held-out data.
        read: reads the rows of each.
    """
    _check_pattern(config.answer_pattern)
    train_field, held_out_field = fields
    source = read(config.path, config.split, train_field, config.subset)
    readable, skipped = _read_examples(source, config, train_field)
    notes = _note(train_field, source, skipped) + _conflicts(train_field, readable)
    if config.held_out_path is None:
        # The position in the source decides, so repairing an unreadable row moves no other row between the splits.
        held_out = tuple(row for row in readable if row.number % config.held_out_every == 0)
        readable = tuple(row for row in readable if row.number % config.held_out_every)
    else:
        other = read(config.held_out_path, config.held_out_split, held_out_field, config.subset)
        held_out, also_skipped = _read_examples(other, config, held_out_field)
        notes += _note(held_out_field, other, also_skipped) + _conflicts(held_out_field, held_out)
    questions = {example.question for example in held_out}
    train = tuple(example for example in readable if example.question not in questions)
    repeated = len(readable) - len(train)
    _check_not_empty(config, fields, train, held_out, repeated=repeated)
    if repeated:
        notes += (f"{train_field}: {repeated} of {len(readable)} training rows left out: their questions are held out",)
    return Data(train=train, held_out=held_out, notes=notes)


def _note(field: str, source: Source, skipped: tuple[str, ...]) -> tuple[str, ...]:
    if not skipped:
        return ()
    return (f"{field}: {len(skipped)} of {len(source.rows)} rows skipped, the first: {'; '.join(skipped[:_EXAMPLES])}",)


def _conflicts(field: str, examples: Sequence[Example]) -> tuple[str, ...]:
    """Return a line about questions whose rows have answers of different texts, if there are any."""
    first: dict[Question, Example] = {}
    conflicts: dict[Question, tuple[Example, Example]] = {}
    for example in examples:
        earlier = first.setdefault(example.question, example)
        if earlier.answer != example.answer:
            conflicts.setdefault(example.question, (earlier, example))
    if not conflicts:
        return ()
    one, other = next(iter(conflicts.values()))
    return (
        f"{field}: {len(conflicts)} questions have rows with different answers, the first: row {one.number} with "
        f"{one.answer[:40]!r} and row {other.number} with {other.answer[:40]!r}",
    )


def _read_examples(source: Source, config: DatasetConfig, field: str) -> tuple[tuple[Example, ...], tuple[str, ...]]:
    """Return the readable rows of a source, and a line with the reason for each other row."""
    columns = find_columns(source, config)
    examples, skipped = [], []
    for row in source.rows:
        example = columns.example(row)
        if isinstance(example, str):
            skipped.append(f"{row.place(source.path)}: {example}")
        else:
            examples.append(example)
    if len(skipped) > config.max_bad_rows * len(source.rows):
        remedy = "mend or remove them, or raise it" if config.max_bad_rows else "mend them"
        raise DataError(
            f"{field} {source.path}: {len(skipped)} of {len(source.rows)} rows are unreadable, more than "
            f"task.max_bad_rows {config.max_bad_rows:g}; {remedy}; the first: {'; '.join(skipped[:_EXAMPLES])}"
        )
    return tuple(examples), tuple(skipped)


def _check_pattern(pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f"task.answer_pattern {pattern!r}: not a regular expression: {error}") from None
    if groups < 1:
        raise ConfigError(f"task.answer_pattern {pattern!r}: expected a group in parentheses around the answer")


def _check_not_empty(
    config: DatasetConfig,
    fields: tuple[str, str],
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    repeated: int,
) -> None:
    if not held_out:
        rule = (
            f"one in task.held_out_every {config.held_out_every} of {fields[0]} {config.path}"
            if config.held_out_path is None
            else f"{fields[1]} {config.held_out_path}"
        )
        remedy = (
            "lower task.held_out_every, add rows, or name other data in task.held_out_path"
            if config.held_out_path is None
            else f"give {fields[1]} readable rows, or leave it out"
        )
        raise DataError(f"{rule}: no row is left for evaluation; {remedy}")
    if not train:
        other = (
            f"give {fields[1]} other rows, or leave it out"
            if config.held_out_path
            else "add rows, or raise task.held_out_every"
        )
        reason = f"; {repeated} of its questions are also held out: {other}" if repeated else ""
        raise DataError(f"{fields[0]} {config.path}: no row is left for training{reason}")
