"""Write text and JSON atomically, and append whole records to files."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.errors import CheckpointError, DamagedFileError


class RecordFile:
    """A file to which whole records are appended, in order.

    A record that cannot be written waits in memory. The next write tries again and overwrites a partly written record.
    Records also stay in memory until the next `sync`, because some disks report only there, and only once, that they
    are full. Records that still wait when the process ends are lost.

    Args:
        path: an existing file is replaced by `records`, in one rename.
        say: called with a message when records begin to wait.
        records: the first records.
    Raises:
        CheckpointError: the file cannot be written now.
    """

    def __init__(self, path: Path, say: Callable[[str], None], records: Iterable[bytes] = ()) -> None:
        self._path, self._say = path, say
        self._waiting = list(records)
        self._size = 0  # bytes of the whole records in the file
        self._unsynced: list[bytes] = []  # records written since the last sync
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
        """Append a record after the waiting records."""
        self._waiting.append(record)
        try:
            self._write_waiting()
        except OSError as error:
            if len(self._waiting) == 1:  # report the first waiting record only
                self._say(f"NOT WRITTEN, training goes on: {self._path}: {error}; its lines wait in memory")

    def sync(self) -> None:
        """Flush all records to disk.

        Raises:
            CheckpointError: they cannot be written. They keep waiting in memory.
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
        """Close the file, and report the records that still cannot be written as lost."""
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
            # At a fixed position, so that a partly written record is overwritten.
            written += os.pwrite(self._file.fileno(), data[written:], self._size + written)
        self._size += written
        self._unsynced += self._waiting
        self._waiting.clear()

    def _cannot_write(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._path} could not be written: {error}; free disk space, or check the folder of run.dir"
        )


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, in the way of `write_text`.

    Raises:
        CheckpointError: the file could not be written. An existing file is unchanged.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new content, also after a power cut.

    Raises:
        CheckpointError: the file could not be written. An existing file is unchanged.
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


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file only names its content in Git LFS, because it was cloned without it."""
    beginning = b"version https://git-lfs.github.com/spec"
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        DamagedFileError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path}: cannot be read: {error}; restore it, or choose another run.dir") from error


def json_record(value: Mapping[str, Any]) -> bytes:
    """Return a value as one line of a file of JSON records."""
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def read_records(path: Path, valid: Callable[[Any], bool], expected: str) -> list[dict[str, Any]]:
    """Return the JSON records of a file, one for each line; no records if the file does not exist.

    A last line without a newline is left out if it begins as a record does: a kill or a power cut cut it short.

    Args:
        valid: returns whether a record has the expected form; it may also raise KeyError or TypeError if not.
        expected: the expected form and a remedy, for the message.
    Raises:
        DamagedFileError: a line is not a valid record, or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error}; restore it, or choose another run.dir") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            is_valid = valid(record)
        except (ValueError, KeyError, TypeError):
            is_valid = False
        if not is_valid:
            raise DamagedFileError(f"{path}:{number}: expected {expected}")
        records.append(record)
    if rest.strip(b"\0")[:1] not in (b"", b"{"):  # some file systems fill a file with zeros after a power cut
        raise DamagedFileError(f"{path}:{len(lines) + 1}: expected {expected}")
    return records


def resume_records(
    path: Path, records: Sequence[Mapping[str, Any]], say: Callable[[str], None], *, version_key: str, last_version: int
) -> tuple[list[Mapping[str, Any]], RecordFile]:
    """Open a file of JSON records to continue it after a weight version.

    Args:
        records: the records of the file.
        version_key: the key of a record's weight version.
        last_version: records of later versions are removed from the file.
    Returns:
        The remaining records, and the file to append to.
    Raises:
        CheckpointError: the file cannot be written.
    """
    remaining = [record for record in records if record[version_key] <= last_version]
    return remaining, RecordFile(path, say, map(json_record, remaining))
