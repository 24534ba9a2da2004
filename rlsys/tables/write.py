"""Tables written as JSONL and Parquet with the same content. Their files are put in place when they are complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.directory import REPORT
from rlsys.tables.schemas import Table

# A Parquet row group is closed after this many characters of JSON, which bounds the rows held in memory.
GROUP_CHARACTERS = 16 * 2**20


class TableFiles:
    """Writer of one table as NAME.jsonl and NAME.parquet. It drops and counts duplicate rows."""

    def __init__(self, folder: Path, table: Table) -> None:
        self.rows = self.duplicates = 0
        self._table = table
        self._schema = pa.schema([(name, column.type) for name, column in table.columns.items()])
        self._lines = (folder / f"{table.name}.jsonl").open("w", encoding="utf-8")
        self._parquet = pq.ParquetWriter(folder / f"{table.name}.parquet", self._schema, compression="zstd")
        self._group: list[Mapping[str, Any]] = []
        self._characters = 0
        self._seen: set[bytes] = set()

    def __enter__(self) -> TableFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self._write_group()
        self._parquet.close()
        self._lines.close()

    def add(self, row: Mapping[str, Any]) -> bool:
        """Append a row of plain Python values, unless it is a duplicate. Return whether it was new.

        A missing value of an optional column is null.
        """
        key = json.dumps([row[name] for name in self._table.key]).encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        if digest in self._seen:
            self.duplicates += 1
            return False
        self._seen.add(digest)
        columns = self._table.columns.items()
        values = {name: row.get(name) if column.optional else row[name] for name, column in columns}
        line = json.dumps(values, allow_nan=False)
        self._lines.write(line + "\n")
        self._group.append(row)
        self._characters += len(line)
        self.rows += 1
        if self._characters >= GROUP_CHARACTERS:
            self._write_group()
        return True

    def _write_group(self) -> None:
        if self._group:
            self._parquet.write_table(pa.Table.from_pylist(self._group, schema=self._schema))
        self._group, self._characters = [], 0


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into. Its files move to `folder` at the end; after an error they are deleted.

    The old report is removed first and the new report moves last. A folder with a report thus holds files of one run.
    """
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        (folder / REPORT).unlink(missing_ok=True)
        for path in sorted(unfinished.iterdir(), key=lambda path: (path.name == REPORT, path.name)):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
