"""Write text and JSON atomically, and append whole records to files."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlsys.errors import CheckpointError


class RecordFile:
    """Appends records, whole and in order.

    Those that cannot be written wait in memory and go with the next one, in the place of what was begun of them. So do
    those that cannot be brought to disk: some disks say only then that they are full, and only once. For that, records
    are held in memory until the next `sync`. What still waits when the process ends is lost.

    Args:
        path: what is there is replaced, as a whole, by `records`.
        say: is told when records begin to wait.
    Raises:
        CheckpointError: it cannot be written now.
    """

    def __init__(self, path: Path, say: Callable[[str], None], records: Iterable[bytes] = ()) -> None:
        self._path, self._say = path, say
        self._waiting = list(records)
        self._size = 0  # of the whole records
        self._unsynced: list[bytes] = []  # written since the last sync
        temporary = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = temporary.open("wb", buffering=0)
            self.sync()
            os.replace(temporary, path)
            fsync(path.parent)
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, record: bytes) -> None:
        """Append a record, after those that wait."""
        self._waiting.append(record)
        try:
            self._write_waiting()
        except OSError as error:
            if len(self._waiting) == 1:  # of several the first ones were said
                self._say(f"NOT WRITTEN, training goes on: {self._path}: {error}; its lines wait in memory")

    def sync(self) -> None:
        """Bring all records to disk.

        Raises:
            CheckpointError: they cannot be written; they wait on.
        """
        try:
            self._write_waiting()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._size -= sum(map(len, self._unsynced))
            self._waiting[:0] = self._unsynced
            self._unsynced.clear()
            raise self._cannot_write(error) from error
        self._unsynced.clear()

    def close(self) -> None:
        """Close the file. What cannot be written of it now is said to be lost."""
        try:
            self._write_waiting()
        except OSError as error:
            self._say(f"{self._path}: its last {len(self._waiting)} lines are lost: {error}")
        self._file.close()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        data, written = memoryview(b"".join(self._waiting)), 0
        while written < len(data):
            # At its place, over what was begun of it before.
            written += os.pwrite(self._file.fileno(), data[written:], self._size + written)
        self._size += written
        self._unsynced += self._waiting
        self._waiting.clear()

    def _cannot_write(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._path} could not be written: {error}; free disk space, or check the folder of run.dir"
        )


def fsync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old content or the new one, also after a power cut.

    Raises:
        CheckpointError: it could not be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: could not be written: {error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
