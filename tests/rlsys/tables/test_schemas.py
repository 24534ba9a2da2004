"""Columns of the training tables: the types they accept."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from rlsys.tables.schemas import COUNT, IDS, MASK, REAL, TABLES, TEXT, VISITS, Column

EVERY = (TEXT, REAL, COUNT, VISITS, IDS, MASK)


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ("a", {TEXT}),
        ("\ud800", set()),
        (1, {COUNT, VISITS}),
        (True, set()),
        (1.0, {REAL}),
        (None, set()),
        ([1, 2], {IDS}),
        ([True, False], {MASK}),
        ([1, True], set()),
        ([], {IDS, MASK}),
    ],
)
def test_a_value_is_accepted_without_conversion(value: Any, columns: set[Column]) -> None:
    assert {column for column in EVERY if column.accepts_value(value)} == columns


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (pa.large_string(), {TEXT}),
        (pa.int8(), {COUNT, VISITS}),
        (pa.uint32(), {COUNT, VISITS}),
        (pa.uint64(), set()),
        (pa.float32(), {REAL}),
        (pa.bool_(), set()),
        (pa.large_list(pa.int64()), {IDS}),
        (pa.list_(pa.uint64()), set()),
        (pa.list_(pa.bool_()), {MASK}),
        (pa.list_(pa.string()), set()),
    ],
)
def test_a_parquet_type_is_accepted_by_its_family(kind: pa.DataType, columns: set[Column]) -> None:
    assert {column for column in EVERY if column.accepts_type(kind)} == columns


@pytest.mark.parametrize("column", EVERY)
def test_a_column_reads_what_it_writes(column: Column) -> None:
    assert column.accepts_type(column.type) and column.accepts_type(column.read_type)


def test_the_key_of_a_table_is_among_its_columns() -> None:
    for table in TABLES:
        assert set(table.key) <= set(table.columns)
        assert list(table.subset(*table.key)) == list(table.key)
