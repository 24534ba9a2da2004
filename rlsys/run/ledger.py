"""The ledger: what became of every prompt of the stream that was issued, by stream index.

    issued = trained + filtered + skipped + in flight

trained: in a training step. filtered: its rollout failed, or its group had no learning signal. skipped: its step was
left out because a loss or gradient was not finite. In flight: issued, buffered or not, and of no step yet; a resumed
run issues it again. ledger.jsonl in the run directory has a line for every online step.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError
from rlsys.files import RecordFile

FATES = ("trained", "filtered", "skipped")


class Ledger:
    """Appends to ledger.jsonl, and checks that no prompt is lost or trained twice.

    On construction lines of versions above `resume_version`, and a last one that a kill cut short, are left out.

    Args:
        resume_version: weight version of the checkpoint the run continues from, -1 for a new run.
        say: is told when lines cannot be written and wait for the next one.
    Raises:
        CheckpointError: a line is not one of a ledger, or the file cannot be written.
    """

    def __init__(self, run_dir: Path, resume_version: int, say: Callable[[str], None] = lambda _text: None) -> None:
        self.path = RunDirectory(run_dir).ledger
        lines = [line for line in read_ledger(self.path) if line["version"] <= resume_version]
        # By its lines: a run that ended before its first online step has left a file without any.
        self._begins = resume_version if resume_version >= 0 and not lines else None
        self._file = RecordFile(self.path, say, map(_line, lines))
        self._open: dict[str, list[int]] = {fate: [] for fate in FATES}
        self._indices = [index for line in lines for fate in _fates(line) for index in line[fate]]
        self._closed = len(self._indices)  # prompts whose fate is known

    def resume(self, cursor: int, in_flight: Sequence[int]) -> None:
        """Check the whole ledger against a run state, prompt by prompt.

        Args:
            cursor: prompts of the stream that were issued. in_flight: those whose fate is open.
        Raises:
            CheckpointError: one is lost, or has two fates.
        """
        if self._begins is not None and cursor:  # the run was begun elsewhere, or when there were no ledgers
            self._indices = sorted(set(range(cursor)) - set(in_flight))
            self._write({"version": self._begins, "before": self._indices, **self._open})
        found = sorted([*self._indices, *in_flight])
        if found != list(range(cursor)):
            raise CheckpointError(
                f"{self.path}: the checkpoint has issued {cursor} prompts, and the ledger with those in flight "
                f"{_difference(found, cursor)}; restore the file, or resume from another checkpoint"
            )
        self._closed, self._indices = cursor - len(in_flight), []

    def note(self, fate: str, indices: Iterable[int]) -> None:
        """The fate of prompts, to be written with the next step."""
        self._open[fate].extend(indices)

    def close_step(self, version: int, cursor: int, in_flight: Sequence[int]) -> None:
        """Write the line of a step, and check that every prompt issued so far has one fate.

        Raises:
            CheckpointError: issued is not the sum of all fates; nothing may be saved then.
        """
        line: dict[str, Any] = {"version": version, **self._open}
        self._closed += sum(map(len, self._open.values()))
        self._open = {fate: [] for fate in FATES}
        self._write(line)
        if cursor != self._closed + len(in_flight):
            raise CheckpointError(
                f"the ledger of weight version {version} does not add up: {cursor} prompts issued, {self._closed} "
                f"trained, filtered or skipped, {len(in_flight)} in flight"
            )

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(_line(line))

    def sync(self) -> None:
        """Bring all lines to disk: a checkpoint cannot be continued without its own.

        Raises:
            CheckpointError: they cannot be written.
        """
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger.jsonl; none where there is no file. A last one without its newline is left out.

    Raises:
        CheckpointError: a line is not one of a ledger.
    """
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
            good = {"version", *FATES} <= set(line) and all(isinstance(line[fate], list) for fate in _fates(line))
        except (ValueError, TypeError):
            good = False
        if not good:
            raise CheckpointError(f"{path}:{number}: expected version, {', '.join(FATES)}; restore the file")
        found.append(line)
    return found


def _line(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _fates(line: dict[str, Any]) -> list[str]:
    """Its lists. `before`: what a run had trained when its ledger began."""
    return [name for name in line if name != "version"]


def _difference(found: Sequence[int], cursor: int) -> str:
    lost = sorted(set(range(cursor)) - set(found))
    twice = sorted({index for index, after in itertools.pairwise(found) if index == after})
    beyond = [index for index in found if not 0 <= index < cursor]
    parts = {"lack": lost, "have twice": twice, "have beyond them": beyond}
    return ", ".join(f"{what} {indices[:5]} ({len(indices)})" for what, indices in parts.items() if indices)
