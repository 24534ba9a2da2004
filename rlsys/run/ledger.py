"""Record the outcome of every issued prompt of the stream, by stream index.

    issued = trained + filtered + skipped + in flight

- trained: the prompt was part of a training step.
- filtered: its rollout failed, or its group had no learning signal.
- skipped: its training step was left out because a loss or gradient was not finite.
- in flight: issued, and not yet part of a step. A resumed run issues it again.

ledger.jsonl in the run directory has a line for every online training step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError, DamagedFileError
from rlsys.files import json_record, read_records, resume_records

OUTCOMES = ("trained", "filtered", "skipped")


class Ledger:
    """The writer of ledger.jsonl, which checks that every prompt has exactly one outcome.

    The constructor removes lines of versions above `resume_version`, and a last line that a kill cut short.

    Args:
        resume_version: weight version of the checkpoint that the run continues from; -1 for a new run.
        say: called with a message when lines cannot be written and wait in memory.
    Raises:
        DamagedFileError: a line of the file is not valid.
        CheckpointError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, resume_version: int, say: Callable[[str], None] = lambda _text: None) -> None:
        self.path = RunDirectory(run_dir).ledger
        lines, self._file = resume_records(
            self.path, read_ledger(self.path), say, version_key="version", last_version=resume_version
        )
        # A run that ended before its first online step has left a file without lines.
        self._first_version = resume_version if resume_version >= 0 and not lines else None
        self._open: dict[str, list[int]] = {outcome: [] for outcome in OUTCOMES}
        self._indices = [index for line in lines for outcome in _outcomes(line) for index in line[outcome]]
        self._closed = len(self._indices)  # prompts with an outcome

    def resume(self, cursor: int, in_flight: Sequence[int]) -> None:
        """Check the whole ledger against a run state, prompt by prompt.

        Args:
            cursor: number of issued prompts of the stream.
            in_flight: issued prompts without an outcome.
        Raises:
            DamagedFileError: a prompt is lost, or has two outcomes.
        """
        if self._first_version is not None and cursor:  # the run has earlier steps that no ledger recorded
            self._indices = sorted(set(range(cursor)) - set(in_flight))
            self._file.write(json_record({"version": self._first_version, "before": self._indices, **self._open}))
        indices = sorted([*self._indices, *in_flight])
        if indices != list(range(cursor)):
            raise DamagedFileError(
                f"{self.path}: the checkpoint has issued {cursor} prompts; the ledger and the prompts in flight "
                f"{_difference(indices, cursor)}; restore the file, or resume from another checkpoint"
            )
        self._closed, self._indices = cursor - len(in_flight), []

    def note(self, outcome: str, indices: Iterable[int]) -> None:
        """Set the outcome of prompts, which the next `close_step` writes."""
        self._open[outcome].extend(indices)

    def close_step(self, version: int, cursor: int, in_flight: Sequence[int]) -> None:
        """Write the line of a training step, and check that the outcomes add up to the issued prompts.

        Args:
            version: weight version that the step made.
            cursor: number of issued prompts of the stream.
            in_flight: issued prompts without an outcome.
        Raises:
            CheckpointError: they do not add up. The caller must not save a checkpoint.
        """
        line: dict[str, Any] = {"version": version, **self._open}
        self._closed += sum(map(len, self._open.values()))
        self._open = {outcome: [] for outcome in OUTCOMES}
        self._file.write(json_record(line))
        if cursor != self._closed + len(in_flight):
            raise CheckpointError(
                f"the ledger of weight version {version} does not add up: {cursor} prompts issued, {self._closed} "
                f"trained, filtered or skipped, {len(in_flight)} in flight"
            )

    def sync(self) -> None:
        """Flush all lines to disk. A checkpoint needs the lines of all its steps.

        Raises:
            CheckpointError: they cannot be written.
        """
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ledger.jsonl; see `rlsys.files.read_records`.

    Raises:
        DamagedFileError: a line is not valid.
    """
    return read_records(path, _is_line, f"version, {', '.join(OUTCOMES)}; restore the file, or start a new run.dir")


def _is_line(line: Any) -> bool:
    return {"version", *OUTCOMES} <= set(line) and all(isinstance(line[outcome], list) for outcome in _outcomes(line))


def _outcomes(line: Mapping[str, Any]) -> list[str]:
    """Return the names of the lists in a line. `before` lists prompts of earlier steps that no ledger recorded."""
    return [name for name in line if name != "version"]


def _difference(indices: Sequence[int], cursor: int) -> str:
    """Describe how sorted indices differ from 0 to cursor - 1."""
    lost = sorted(set(range(cursor)) - set(indices))
    twice = sorted({index for index, after in itertools.pairwise(indices) if index == after})
    beyond = [index for index in indices if not 0 <= index < cursor]
    parts = {"lack": lost, "contain twice": twice, "contain, although not issued,": beyond}
    return ", ".join(f"{verb} {part[:5]} ({len(part)})" for verb, part in parts.items() if part)
