"""Files with the kept rollouts of a run: rollouts/000300.jsonl.gz has those of weight versions 300 to 399.

The rows of a step are one gzip member, so `zcat` reads a file whole, and a kill cuts off no more than the last member.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError, DamagedFileError
from rlsys.files import RecordFile, json_record
from rlsys.interfaces import TokenValues
from rlsys.run.lock import may_be_in_use
from rlsys.run.rollouts import (
    FORMAT,
    READABLE,
    Decode,
    TokenTexts,
    choose_groups,
    choose_places,
    group_rows,
    with_values,
)
from rlsys.types import TrajectoryGroup

VERSIONS = 100  # of a file
Rows = list[dict[str, Any]]
SKIPPED = TokenValues(untrained="not trained: the step was skipped, because a loss or gradient was not finite")
_NAME = re.compile(r"(\d{6,})\.jsonl\.gz")


@dataclass(frozen=True, slots=True)
class KeptRollouts:
    """Rollouts of a step that are kept, while the step is made.

    Attributes:
        places: numbers of group and completion, for `TrainingBatch.kept`.
        rows: makes their rows.
        write: writes the record made of them.
    """

    places: tuple[tuple[int, int], ...]
    rows: asyncio.Task[Rows]
    write: Callable[[bytes], None]

    async def finish(self, values: Sequence[TokenValues]) -> None:
        """Write the rows with what the step had for their tokens."""
        self.write(await asyncio.to_thread(record, await self.rows, values))

    async def skip(self) -> None:
        """Write the rows of a step that was skipped."""
        await self.finish([SKIPPED] * len(self.places))


class RolloutLog:
    """The writer of rollouts/. Rollouts that cannot be written are lost or wait, and never end a run.

    The constructor removes rows of versions above `resume_version`, so that the files of a resumed run equal those of
    an uninterrupted run.

    Args:
        resume_version: weight version of the checkpoint that the run continues from; -1 for a new run.
        prompts: number of prompts of a step whose completions are kept.
        decode: text of token ids, special tokens included.
        say: called with a message when rows cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_version: int,
        prompts: int,
        decode: Decode,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._folder = RunDirectory(run_dir).rollouts
        self._prompts, self._decode, self._say = prompts, decode, say
        self._texts = TokenTexts(decode)
        self._file: RecordFile | None = None
        self._chunk = -1
        self._reported = False
        try:
            self._resume(resume_version)
        except (OSError, CheckpointError) as error:
            self._report(error)

    def rows(self, groups: Sequence[TrajectoryGroup], stage: str, step: int, version: int) -> Rows:
        """Return the rows of a step before it is trained; none if its tokens have no text.

        Args:
            version: the weight version after the step.
        """
        place = {"version": version, "stage": stage, "step": step}
        try:
            chosen = choose_groups(groups, self._prompts)
            return [row for n in chosen for row in group_rows(groups[n], self._texts, self._decode, place)]
        except Exception as error:  # noqa: BLE001 - a tokenizer that cannot decode must not end the run
            self._report(error)
            return []

    def start(self, groups: Sequence[TrajectoryGroup], stage: str, step: int, version: int) -> KeptRollouts | None:
        """Begin to make the rows of a step in a thread; None if nothing is kept."""
        places = choose_places(groups, self._prompts)
        if not places:
            return None
        rows = asyncio.create_task(asyncio.to_thread(self.rows, groups, stage, step, version))
        return KeptRollouts(places, rows, lambda record: self.write(version, record))

    def write(self, version: int, record: bytes) -> None:
        """Append the record of a weight version, unless it is empty."""
        if not record:
            return
        try:
            self._open(version).write(record)
        except (OSError, CheckpointError) as error:
            self._report(error)

    def sync(self) -> None:
        """Flush all records to disk. Records that cannot be written only wait in memory."""
        if self._file is not None:
            try:
                self._file.sync()
            except CheckpointError as error:
                self._report(error)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, version: int) -> RecordFile:
        """Return the file of a weight version, with the records before it if it exists."""
        chunk = version // VERSIONS
        if self._file is None or chunk != self._chunk:
            self.close()
            path = self._folder / f"{chunk * VERSIONS:06d}.jsonl.gz"
            kept = self._kept(path, version - 1) if path.exists() else []
            self._chunk, self._file = chunk, RecordFile(path, self._say, kept)
        return self._file

    def _resume(self, version: int) -> None:
        for first, path in rollout_files(self._folder):
            if first > version:
                path.unlink()
            elif first + VERSIONS > version:
                self._chunk, self._file = first // VERSIONS, RecordFile(path, self._say, self._kept(path, version))

    def _kept(self, path: Path, version: int) -> list[bytes]:
        try:
            return [member for member, rows in read_members(path) if rows[0]["version"] <= version]
        except DamagedFileError as error:
            path.rename(path.with_name(f"{path.name}.damaged"))
            self._say(f"{error.message}; renamed to {path.name}.damaged")
            return []

    def _report(self, error: Exception) -> None:
        if not self._reported:
            self._reported = True
            self._say(f"rollouts are not kept, training goes on: {error}")


def record(rows: Rows, values: Sequence[TokenValues]) -> bytes:
    """Return the record of a step from its rows and their values; empty without rows."""
    if not rows:
        return b""
    finished = (with_values(row, each) for row, each in zip(rows, values, strict=True))
    return gzip.compress(b"".join(map(json_record, finished)), compresslevel=6, mtime=0)


def rollout_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the first weight version and the path of every file of rollouts, in order."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in paths if (match := _NAME.fullmatch(path.name)))


def read_members(path: Path) -> Iterator[tuple[bytes, list[dict[str, Any]]]]:
    """Yield the bytes and the rows of every step of a file, without a last step that was cut short.

    Raises:
        DamagedFileError: the file cannot be read, or has rows of another format.
    """
    advice = "move the file away"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error}") from error
    while data:
        reader = zlib.decompressobj(wbits=31)
        try:
            text = reader.decompress(data)
            rows = [json.loads(line) for line in text.splitlines()] if reader.eof else []
        except (zlib.error, ValueError) as error:
            raise DamagedFileError(f"{path}: expected rollouts, found damaged data ({error}); {advice}") from None
        if not reader.eof:
            return
        newer = [row.get("format") if isinstance(row, dict) else row for row in rows if not _is_row(row)]
        if newer or not rows:
            raise DamagedFileError(
                f"{path}: expected rollouts of format {FORMAT} or older, found {newer[:1]}; {advice}"
            )
        member, data = data[: len(data) - len(reader.unused_data)], reader.unused_data
        yield member, rows


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and row.get("format") in READABLE and type(row.get("version")) is int


def cut_off_faults(run_dir: Path) -> list[str]:
    """Return the faults of files cut off inside their first step; none if a process may be writing them."""
    if may_be_in_use(run_dir):
        return []
    paths = [path for _, path in rollout_files(RunDirectory(run_dir).rollouts)]
    return [
        f"{path}: expected rollouts, found the file cut off inside its first step; restore it"
        for path in paths
        if path.stat().st_size and not any(rows for _, rows in read_members(path))
    ]


def read_rollouts(run_dir: Path, first: int) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of the file that begins with a weight version, by weight version."""
    paths = dict(rollout_files(RunDirectory(run_dir).rollouts))
    return rows_by_version(paths[first]) if first in paths else {}


def rows_by_version(path: Path) -> dict[int, Rows]:
    """Return the rows of a file by weight version.

    A version has the rows of the step that made it, after those of skipped steps.

    Raises:
        DamagedFileError: see `read_members`.
    """
    by_version: dict[int, Rows] = {}
    for _, rows in read_members(path):
        by_version.setdefault(rows[0]["version"], []).extend(rows)
    return by_version
