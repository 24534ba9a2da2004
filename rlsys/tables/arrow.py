"""Rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.errors import DataError
from rlsys.tables.files import Row, first_line, refuse_repeats

BATCH = 1024
"""Rows of a file that are converted at once."""


def parquet_rows(stream: IO[bytes], where: str) -> Iterator[Row]:
    file = open_parquet(stream, where)
    try:
        yield from _numbered(batch for batch in file.iter_batches(BATCH))
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


def arrow_rows(stream: IO[bytes], where: str) -> Iterator[Row]:
    data = stream.read()
    try:
        is_file = data.startswith(b"ARROW1")  # the other form is a stream, as in the cache of datasets
        table = (pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{where}: not a readable Arrow file: {first_line(error)}") from None
    refuse_repeats(table.column_names, where)
    yield from _numbered(table.to_batches(BATCH))


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        names = short_float_columns(batch.schema)
        for values in batch.to_pylist():
            number += 1
            yield Row(number=number, values=with_short_floats(values, names))


def short_float_columns(schema: pa.Schema) -> dict[str, Any]:
    """Return the columns with fewer than 64 bits for a number, and their numpy types."""
    short = {pa.float32(): np.float32, pa.float16(): np.float16}
    return {field.name: short[field.type] for field in schema if field.type in short}


def with_short_floats(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose numbers of 32 and 16 bits have their own digits: 0.1, not 0.10000000149011612."""
    shortened = {name: float(str(kind(values[name]))) for name, kind in kinds.items() if values[name] is not None}
    return {**values, **shortened}
