"""A JSONL or Parquet file of rows, read in batches: columns by name, types checked, and errors that name the row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlsys.errors import DataError
from rlsys.tables.sources import expand, first_line, is_unicode, json_object, refuse_repeats

BATCH = 1024
UNKNOWN = -1
"""What a column that may be left out has where it is."""

Kind = dict[str, "Column"]
Element = TypeVar("Element", np.int32, np.bool_)


@dataclass(frozen=True, slots=True)
class Column:
    """What a column holds. needed: whether a row may leave it out."""

    expected: str
    arrow: Callable[[pa.DataType], bool]
    python: Callable[[Any], bool]
    needed: bool = True


def _list_of(expected: str, kind: type, arrow: Callable[[pa.DataType], bool]) -> Column:
    return Column(
        expected,
        lambda found: (pa.types.is_list(found) or pa.types.is_large_list(found)) and arrow(found.value_type),
        lambda value: isinstance(value, list) and set(map(type, value)) <= {kind},
    )


def _is_whole(found: pa.DataType) -> bool:
    return pa.types.is_integer(found) and found != pa.uint64()  # which is no int64


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found)


IDS = _list_of("a list of whole numbers", int, _is_whole)
MASK = _list_of("a list of truth values", bool, pa.types.is_boolean)
TEXT = Column("text", _is_text, lambda value: isinstance(value, str) and is_unicode(value))
COUNT = Column("a whole number", _is_whole, lambda value: type(value) is int)
VISITS = Column("a whole number or null", _is_whole, lambda value: type(value) is int, needed=False)


@dataclass(frozen=True, slots=True)
class Ragged(Generic[Element]):
    """Rows of different lengths in one array. starts: [R + 1]; row r is values[starts[r]:starts[r + 1]]."""

    values: NDArray[Element]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[Element]:
        return self.values[self.starts[row] : self.starts[row + 1]]

    def count(self, found: NDArray[np.bool_]) -> NDArray[np.int64]:
        """[R], how many of each row's entries are True in `found`, an array as long as `values`."""
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(found)])
        return before[self.starts[1:]] - before[self.starts[:-1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows. numbers: of each row in the file, from 1; columns: those that the file has."""

    where: str
    numbers: Sequence[int]
    columns: Mapping[str, pa.Array]

    def refuse(self, bad: NDArray[np.bool_], column: str, problem: str | Callable[[int], str]) -> None:
        """Raise DataError for the first bad row."""
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            found = problem if isinstance(problem, str) else problem(row)
            raise DataError(f"{self.where}, row {self.numbers[row]}, column {column}: {found}")

    def ids(self, name: str) -> Ragged[Any]:
        return self._flat(name)

    def masks(self, name: str) -> Ragged[np.bool_]:
        return self._flat(name)

    def counts(self, name: str) -> NDArray[np.int64]:
        return self.columns[name].cast(pa.int64()).to_numpy(zero_copy_only=False)

    def visits(self, name: str) -> NDArray[np.int64]:
        if name not in self.columns:
            return np.full(len(self.numbers), UNKNOWN, dtype=np.int64)
        found = self.columns[name].cast(pa.int64()).fill_null(UNKNOWN).to_numpy(zero_copy_only=False)
        given = np.asarray(self.columns[name].is_valid())
        self.refuse(given & (found < 0), name, lambda row: f"expected 0 or more, found {found[row]}")
        return found

    def texts(self, name: str) -> list[str]:
        texts: list[str] = self.columns[name].to_pylist()
        return texts

    def _flat(self, name: str) -> Ragged[Any]:
        column = self.columns[name]
        starts = np.asarray(column.offsets, dtype=np.int64)
        values = column.values.slice(int(starts[0]), int(starts[-1] - starts[0]))
        if values.null_count:
            holes: Ragged[np.bool_] = Ragged(~np.asarray(values.is_valid()), starts - starts[0])
            self.refuse(holes.count(holes.values) > 0, name, "expected no null in the list, found one")
        return Ragged(values.to_numpy(zero_copy_only=False), starts - starts[0])


class RowFile:
    """A file of rows. where: how errors name it."""

    def __init__(self, path: str, source: str) -> None:
        self._path = Path(expand(path, source))
        self.where = f"{source} {self._path}"
        if self._path.suffix not in (".jsonl", ".parquet"):
            raise DataError(f"{self.where}: expected a .jsonl or .parquet file")
        if not self._path.is_file():
            raise DataError(f"{self.where}: no such file")

    def kind(self, kinds: Sequence[Kind]) -> Kind:
        """The first kind of rows whose columns the file has.

        Raises:
            DataError: it has those of none.
        """
        names = self._names()
        for kind in kinds:
            if all(name in names for name, column in kind.items() if column.needed):
                return kind
        wanted = [" + ".join(name for name, column in kind.items() if column.needed) for kind in kinds]
        raise DataError(
            f"{self.where}: expected the columns {', or '.join(wanted)}; found {', '.join(names) or 'none'}"
        )

    def batches(self, kind: Kind) -> Iterator[Batch]:
        """All rows, with the columns of a kind.

        Raises:
            DataError: a value is missing or of a wrong type; there is no row.
        """
        empty = True
        for batch in self._parquet(kind) if self._path.suffix == ".parquet" else self._lines(kind):
            empty = False
            for name, column in kind.items():
                if column.needed:
                    missing = np.asarray(batch.columns[name].is_null())
                    batch.refuse(missing, name, f"expected {column.expected}, found null")
            yield batch
        if empty:
            raise DataError(f"{self.where}: expected at least one row, found none")

    def _names(self) -> list[str]:
        if self._path.suffix == ".parquet":
            return list(self._opened().schema_arrow.names)
        for _, values in self._objects():
            return list(values)
        raise DataError(f"{self.where}: expected at least one row, found none")

    def _opened(self) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(self._path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.where}: not a readable Parquet file: {first_line(error)}") from None
        refuse_repeats(file.schema_arrow.names, self.where)
        return file

    def _parquet(self, kind: Kind) -> Iterator[Batch]:
        file, first = self._opened(), 1
        names = [name for name in kind if name in file.schema_arrow.names]
        for name in names:
            found = file.schema_arrow.field(name).type
            if not kind[name].arrow(found):
                raise DataError(f"{self.where}, column {name}: expected {kind[name].expected}, found {found}")
        try:
            for batch in file.iter_batches(BATCH, columns=names):
                yield Batch(self.where, range(first, first + len(batch)), dict(zip(names, batch.columns, strict=True)))
                first += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.where}: not a readable Parquet file: {first_line(error)}") from None

    def _lines(self, kind: Kind) -> Iterator[Batch]:
        types = {id(IDS): pa.list_(pa.int64()), id(MASK): pa.list_(pa.bool_()), id(TEXT): pa.string()}
        waiting: list[tuple[int, dict[str, Any]]] = []

        def batch() -> Batch:
            numbers, rows = zip(*waiting, strict=True)
            columns = {
                name: pa.array([row.get(name) for row in rows], types.get(id(column), pa.int64()))
                for name, column in kind.items()
            }
            return Batch(self.where, numbers, columns)

        for number, values in self._objects():
            waiting.append((number, {name: values.get(name) for name in kind}))
            for name, column in kind.items():
                self._check_value(number, name, column, values)
            if len(waiting) == BATCH:
                yield batch()
                waiting.clear()
        if waiting:
            yield batch()

    def _check_value(self, number: int, name: str, column: Column, values: Mapping[str, Any]) -> None:
        value = values.get(name)
        if value is None and not column.needed:
            return
        if not column.python(value):
            found = _described(value) if name in values else "no such column in this row"
            raise DataError(f"{self.where}, row {number}, column {name}: expected {column.expected}, found {found}")
        numbers: list[Any] = value if isinstance(value, list) else [value] if column is not TEXT else []
        if max(map(abs, numbers), default=0) >= 2**63:
            raise DataError(f"{self.where}, row {number}, column {name}: found a number of more than 64 bits")

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Lines that are not empty, with their numbers from 1."""
        try:
            with self._path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield number, self._object(number, line)
        except OSError as error:
            raise DataError(f"{self.where}: cannot be read: {error.strerror}") from None

    def _object(self, number: int, line: bytes) -> dict[str, Any]:
        value = json_object(line)
        if isinstance(value, str):
            raise DataError(f"{self.where}, row {number}: {value}")
        return value


def _described(value: Any) -> str:
    if isinstance(value, list):
        kinds = sorted({type(entry).__name__ for entry in value})
        return f"a list of {', '.join(kinds)}" if kinds else "an empty list"
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
