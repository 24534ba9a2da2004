"""Multi-IF: conversations of up to three turns, whose instructions add up and can be checked by a program.

The user's next message is the reply of an environment, whatever the policy wrote before.

Source: He et al., Multi-IF, arXiv:2410.15553; data set facebook/Multi-IF.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from rlsys.config.outside_tasks import BenchmarkConfig
from rlsys.errors import DataError
from rlsys.interfaces import Reply
from rlsys.tables.sources import Source
from rlsys.tasks.benchmarks import BenchmarkTask
from rlsys.tasks.dataset import Data
from rlsys.tasks.instructions import instructions, missed_note
from rlsys.types import Problem, Verdict

TURNS = 3
LANGUAGE = "English"
"""The checks of if-verifiable count words and find sentences as English has them."""
_CELLS = ("prompt", "instruction_id_list", "kwargs")


def reply(problem: Problem, turns: Sequence[str]) -> Reply:
    """Return the user's next message, and as reward the followed share of the last turn's instructions.

    The shares of all turns add up to 1. The problem is solved if every turn follows all its instructions.
    """
    if not turns:
        return Reply()
    conversation = problem.metadata["conversation"]
    results = [_followed(turn, text) for turn, text in zip(conversation, turns, strict=False)]
    share = sum(results[-1]) / len(results[-1])
    is_last = len(turns) == len(conversation)
    missed = missed_note(conversation[len(turns) - 1]["instruction_id_list"], results[-1])
    return Reply(
        text="" if is_last else conversation[len(turns)]["prompt"],
        done=is_last,
        reward=share / len(conversation),
        solved=is_last and all(map(all, results)),
        detail=f"turn {len(turns)}: {missed}" if missed else "",
    )


class MultiIfTask(BenchmarkTask):
    """Task with the conversations in English. Its environment judges them."""

    one_answer = False

    def __init__(self, config: BenchmarkConfig, seed: int) -> None:
        super().__init__(config, seed)
        self._instructions = instructions("multi_if")  # no reply of the environment has to wait for the imports

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Leave whole conversations to the environment. One that was cut off is wrong, whatever else rewards it."""
        if not finished:
            return Verdict(outcome="wrong", reward=0.0, answered=False, detail="the conversation was cut off")
        return super().verify(problem, completion, finished)

    def notes(self) -> tuple[str, ...]:
        return (*self._data.notes, f"task.name multi_if: the conversations in {LANGUAGE} alone")

    def _read(self, path: str, split: str, field: str, subset: str | None) -> Source:
        return _conversations(super()._read(path, split, field, subset))

    @cached_property
    def _data(self) -> Data:
        data, names = super()._data, set[str]()
        for example in data.train + data.held_out:
            for number, turn in enumerate(example.columns["conversation"], 1):
                where = f"row {example.number}, turn {number}"
                self._instructions.check_row(where, turn["instruction_id_list"], turn["kwargs"])
                names.update(turn["instruction_id_list"])
        self._instructions.check_data(names)
        return data


def _followed(turn: Mapping[str, Any], text: str) -> list[bool]:
    """Return whether a text follows each instruction of a turn. An empty text follows none."""
    names = turn["instruction_id_list"]
    return instructions("multi_if").followed(text, names, turn["kwargs"], turn["prompt"]) or [False] * len(names)


def _conversations(source: Source) -> Source:
    """Return the English rows with the first message as plain text, and all turns in the column `conversation`."""
    rows = tuple(
        replace(row, values=row.values if isinstance(row.values, str) else _with_turns(row.values))
        for row in source.rows
        if isinstance(row.values, str) or row.values.get("language", LANGUAGE) == LANGUAGE
    )
    if not rows:
        raise DataError(f"{source.path}: expected rows whose column 'language' is {LANGUAGE}, found none")
    return replace(source, rows=rows, columns=(*source.columns, "conversation"))


def _with_turns(values: dict[str, Any]) -> dict[str, Any] | str:
    """Return a row with its turns as JSON values, or the reason why it cannot be read."""
    turns = []
    for number in range(1, TURNS + 1):
        if values.get(f"turn_{number}_prompt"):
            names = [f"turn_{number}_{cell}" for cell in _CELLS]
            try:
                prompt, ids, arguments = (_parsed(values.get(name)) for name in names)
                turns.append(
                    {
                        "prompt": prompt["content"],
                        "instruction_id_list": ids,
                        "kwargs": [_parsed(each) for each in arguments],
                    }
                )
            except (ValueError, KeyError, TypeError):
                return f"turn {number}: expected JSON in the columns {', '.join(names)}, as facebook/Multi-IF has it"
    if not turns:
        return "expected a first turn in the column 'turn_1_prompt', found none"
    return {**values, "turn_1_prompt": turns[0]["prompt"], "conversation": turns}


def _parsed(cell: Any) -> Any:
    """Return the value of a cell with JSON in it."""
    return json.loads(cell) if isinstance(cell, str) else cell
