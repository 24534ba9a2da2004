"""Rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.errors import DataError
from rlsys.tables.compression import ROW_BYTES, Expansion
from rlsys.tables.files import Row, first_line, refuse_repeats

BATCH = 1024
"""Rows of a file that are converted at once."""
# Least size of a value in memory.
_NUMBER_BYTES = 8
_SHORT = {pa.float32(): np.float32, pa.float16(): np.float16}


def parquet_rows(stream: IO[bytes], where: str, expansion: Expansion) -> Iterator[Row]:
    file = open_parquet(stream, where)
    refuse_declared(file, expansion)
    try:
        yield from _numbered(file.iter_batches(BATCH), expansion)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{where}: not a readable Parquet file: {first_line(error)}") from None


def open_parquet(stream: IO[bytes] | Path, where: str) -> pq.ParquetFile:
    """Open a Parquet file whose columns have different names."""
    try:
        file = pq.ParquetFile(stream)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{where}: not a readable Parquet file: {first_line(error)}") from None
    refuse_repeats(file.schema_arrow.names, where)
    return file


def refuse_declared(file: pq.ParquetFile, expansion: Expansion) -> None:
    """Raise DataError if the sizes that a Parquet file declares are beyond the bound of what it may expand to."""
    groups = range(file.metadata.num_row_groups)
    expansion.check(sum(file.metadata.row_group(group).total_byte_size for group in groups))


def arrow_rows(stream: IO[bytes], where: str, expansion: Expansion) -> Iterator[Row]:
    data = stream.read()
    try:
        is_file = data.startswith(b"ARROW1")  # the other form is a stream, as in the cache of datasets
        reader = pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)
        refuse_repeats(reader.schema.names, where)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        yield from _numbered(_split(batches), expansion)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{where}: not a readable Arrow file: {first_line(error)}") from None


def _split(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield from (batch.slice(start, BATCH) for start in range(0, len(batch), BATCH))


def _numbered(batches: Iterable[pa.RecordBatch], expansion: Expansion) -> Iterator[Row]:
    number = 0
    for batch in batches:
        names, short = batch.schema.names, short_float_columns(batch.schema)
        for cells in zip(*map(_values, batch.columns), strict=True):
            number += 1
            expansion.add(ROW_BYTES + sum(map(_size, cells)))
            yield Row(number=number, values=with_short_floats(dict(zip(names, cells, strict=True)), short))


def _size(value: Any) -> int:
    """Return the size of a value in memory; encodings repeat values, so the buffers of a file say little."""
    if isinstance(value, str | bytes):
        return len(value)
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return _NUMBER_BYTES + sum(map(_size, entries))


def _values(column: pa.Array) -> list[Any]:
    """Return the values of a column; None where Python has no object, as for the year -5000."""
    try:
        return column.to_pylist(maps_as_pydicts="lossy")
    except (OverflowError, ValueError, LookupError, pa.ArrowException):
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="lossy")
    except (OverflowError, ValueError, LookupError, pa.ArrowException):
        return None


def short_float_columns(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return the types of the columns that have numbers of fewer than 64 bits, also in lists and nested columns."""
    return {field.name: field.type for field in schema if _has_short_floats(field.type)}


def _has_short_floats(kind: pa.DataType) -> bool:
    return kind in _SHORT or any(_has_short_floats(kind.field(place).type) for place in range(kind.num_fields))


def with_short_floats(values: Mapping[str, Any], kinds: Mapping[str, pa.DataType]) -> dict[str, Any]:
    """Return a row whose numbers of 32 and 16 bits have their own digits: 0.1, not 0.10000000149011612."""
    return {**values, **{name: _shortened(values[name], kind) for name, kind in kinds.items()}}


def _shortened(value: Any, kind: pa.DataType) -> Any:
    if kind in _SHORT and value is not None:
        return float(str(_SHORT[kind](value)))
    if isinstance(value, list) and kind.num_fields == 1:
        return [_shortened(entry, kind.field(0).type) for entry in value]
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {name: _shortened(entry, kind.field(name).type) for name, entry in value.items()}
    return value
