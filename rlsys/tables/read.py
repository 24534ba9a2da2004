"""Data files of rows, read in batches. Types are checked, and errors name the row and the column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlsys.errors import DataError
from rlsys.tables.arrow import BATCH, open_parquet, refuse_declared
from rlsys.tables.compression import Expansion
from rlsys.tables.files import Row, check_file, described, first_line, type_name
from rlsys.tables.schemas import Column
from rlsys.tables.sources import WHOLE, Part, expand, is_file_name, iterate_rows

UNKNOWN = -1
"""Value of a row that has no number in an optional column."""

Layout = Mapping[str, Column]
"""Columns by name that are read together."""
Element = TypeVar("Element", np.int32, np.bool_, np.float32)


@dataclass(frozen=True, slots=True)
class Ragged(Generic[Element]):
    """R rows of different lengths in one array.

    Attributes:
        values: All rows, joined.
        starts: [R + 1] int64. Row r is values[starts[r]:starts[r + 1]].
    """

    values: NDArray[Element]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[Element]:
        return self.values[self.starts[row] : self.starts[row + 1]]

    def count(self, marks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the number of True marks of each row, [R]. `marks` is as long as `values`."""
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(marks)])
        return before[self.starts[1:]] - before[self.starts[:-1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows of a file.

    Attributes:
        where: Name of the file in error messages.
        numbers: Number of each row in the file, from 1.
        columns: Columns of the layout that the file has.
    """

    where: str
    numbers: Sequence[int]
    columns: Mapping[str, pa.Array]

    def refuse(self, bad: NDArray[np.bool_], column: str, problem: str | Callable[[int], str]) -> None:
        """Raise DataError for the first bad row. `problem` is the message, or a function of the row's index."""
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            message = problem if isinstance(problem, str) else problem(row)
            raise DataError(f"{self.where}, row {self.numbers[row]}, column {column}: {message}")

    def ids(self, name: str) -> Ragged[Any]:
        return self._flat(name)

    def masks(self, name: str) -> Ragged[np.bool_]:
        return self._flat(name)

    def reals(self, name: str) -> Ragged[np.float32]:
        """Return a column of lists of numbers."""
        rows = self._flat(name)
        return Ragged(rows.values.astype(np.float32), rows.starts)

    def counts(self, name: str) -> NDArray[np.int64]:
        return self.columns[name].cast(pa.int64()).to_numpy(zero_copy_only=False)

    def visits(self, name: str) -> NDArray[np.int64]:
        """Return an optional column of counts; `UNKNOWN` replaces missing values."""
        if name not in self.columns:
            return np.full(len(self.numbers), UNKNOWN, dtype=np.int64)
        visits = self.columns[name].cast(pa.int64()).fill_null(UNKNOWN).to_numpy(zero_copy_only=False)
        is_given = np.asarray(self.columns[name].is_valid())
        self.refuse(is_given & (visits < 0), name, lambda row: f"expected 0 or more, found {visits[row]}")
        return visits

    def texts(self, name: str) -> list[str]:
        texts: list[str] = self.columns[name].to_pylist()
        return texts

    def _flat(self, name: str) -> Ragged[Any]:
        column = self.columns[name]
        starts = np.asarray(column.offsets, dtype=np.int64)
        values = column.values.slice(int(starts[0]), int(starts[-1] - starts[0]))
        if values.null_count:
            nulls: Ragged[np.bool_] = Ragged(~np.asarray(values.is_valid()), starts - starts[0])
            self.refuse(nulls.count(nulls.values) > 0, name, "expected no null in the list, found one")
        return Ragged(values.to_numpy(zero_copy_only=False), starts - starts[0])


class RowFile:
    """A file or data set of rows. `where` is its name in error messages.

    Args:
        path: A file, or the folder or hub id of a data set.
        source: Config field that names the path.
        part: Part of a data set.
    """

    def __init__(self, path: str, source: str, part: Part = WHOLE) -> None:
        self._path, self._part = Path(expand(path, source)), part
        self.where = f"{source} {self._path}"
        if is_file_name(str(self._path)):
            check_file(self._path, self.where)
        # A Parquet file is read by columns; from any other kind of file come rows.
        self._has_columns = self._path.suffix == ".parquet" and self._path.is_file()

    def rows(self) -> Iterator[Row]:
        """Yield all rows as they are, with the reason in place of a row that cannot be read."""
        return iterate_rows(str(self._path), self._part, self.where)

    def names(self) -> list[str]:
        """Return the columns of the file: those of a Parquet file, or else those of the first rows.

        Raises:
            DataError: The file cannot be read, or has no row.
        """
        if self._has_columns:
            return list(open_parquet(self._path, self.where).schema_arrow.names)
        rows = self.rows()
        first = list(islice(rows, BATCH))
        readable = [row.values for row in first if isinstance(row.values, dict)]
        if not readable:
            readable = list(islice((row.values for row in rows if isinstance(row.values, dict)), 1))
        if readable:
            return list(dict.fromkeys(name for values in readable for name in values))
        problem = f", row {first[0].number}: {first[0].values}" if first else ": expected at least one row, found none"
        raise DataError(f"{self.where}{problem}")

    def layout(self, layouts: Sequence[Layout]) -> Layout | None:
        """Return the first layout whose required columns the file has, or None."""
        names = set(self.names())
        required = ({name for name, column in layout.items() if not column.optional} for layout in layouts)
        return next((layout for layout, columns in zip(layouts, required, strict=True) if columns <= names), None)

    def batches(self, layout: Layout) -> Iterator[Batch]:
        """Yield all rows with the columns of a layout.

        Raises:
            DataError: A value is missing or has a wrong type, or the file has no row.
        """
        is_empty = True
        for batch in self._parquet(layout) if self._has_columns else self._lines(layout):
            is_empty = False
            for name, column in layout.items():
                if not column.optional:
                    nulls = np.asarray(batch.columns[name].is_null())
                    batch.refuse(nulls, name, f"expected {column.expected}, found null")
            yield batch
        if is_empty:
            raise DataError(f"{self.where}: expected at least one row, found none")

    def _parquet(self, layout: Layout) -> Iterator[Batch]:
        file, first = open_parquet(self._path, self.where), 1
        expansion = Expansion(self._path, self.where)
        refuse_declared(file, expansion)
        names = [name for name in layout if name in file.schema_arrow.names]
        for name in names:
            file_type = file.schema_arrow.field(name).type
            if not layout[name].accepts_type(file_type):
                raise DataError(f"{self.where}, column {name}: expected {layout[name].expected}, found {file_type}")
        try:
            for batch in file.iter_batches(BATCH, columns=names):
                expansion.add(batch.nbytes)
                yield Batch(self.where, range(first, first + len(batch)), dict(zip(names, batch.columns, strict=True)))
                first += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.where}: not a readable Parquet file: {first_line(error)}") from None

    def _lines(self, layout: Layout) -> Iterator[Batch]:
        # Checked row by row: the JSON readers of pyarrow and datasets convert values and do not name the bad row.
        numbers: list[int] = []
        rows: list[list[Any]] = []
        for number, values in self._objects():
            for name, column in layout.items():
                self._check_value(number, name, column, values)
            numbers.append(number)
            rows.append([values.get(name) for name in layout])
            if len(rows) == BATCH:
                yield self._batch(layout, numbers, rows)
                numbers, rows = [], []
        if rows:
            yield self._batch(layout, numbers, rows)

    def _batch(self, layout: Layout, numbers: Sequence[int], rows: Sequence[Sequence[Any]]) -> Batch:
        columns = zip(layout.items(), zip(*rows, strict=True), strict=True)
        arrays = {name: pa.array(values, column.read_type) for (name, column), values in columns}
        return Batch(self.where, numbers, arrays)

    def _check_value(self, number: int, name: str, column: Column, values: Mapping[str, Any]) -> None:
        value = values.get(name)
        if value is None and column.optional:
            return
        if not column.accepts_value(value):
            given = _described(value) if name in values else "no such column in this row"
            raise DataError(f"{self.where}, row {number}, column {name}: expected {column.expected}, found {given}")
        entries: list[Any] = value if isinstance(value, list) else [value]
        if column.element is int and max(map(abs, entries), default=0) >= 2**63:
            raise DataError(f"{self.where}, row {number}, column {name}: found a number of more than 64 bits")

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the values of all rows with their numbers."""
        for row in self.rows():
            if isinstance(row.values, str):
                raise DataError(f"{self.where}, row {row.number}: {row.values}")
            yield row.number, row.values


def _described(value: Any) -> str:
    if isinstance(value, list):
        types = sorted(set(map(type_name, value)))
        return f"a list of {', '.join(types)}" if types else "an empty list"
    return described(value)
