"""Files of every kind: the same rows, exact texts of numbers, and clear messages."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from rlsys.errors import DataError
from rlsys.tables.files import described
from rlsys.tables.sources import Source, read_source

ROWS = [{"question": 'a, "b"\nc', "answer": "007"}, {"question": "é", "answer": "1e-07"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'question, answer\n"a, ""b""\nc",007\n\né,1e-07\n'
TEXTS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.txt": LINES,
    "a.json": json.dumps(ROWS, indent=2),
    "b.json": json.dumps(ROWS),
    "b.jsonl": "\n" + json.dumps(ROWS),
    "c.json": LINES,
    "a.csv": "\ufeff" + CSV,
    "A.TSV": 'question\tanswer\n"a, ""b""\nc"\t007\né\t1e-07\n',
}


def read(path: Path) -> Source:
    return read_source(str(path), "train", "task.path")


def values(path: Path) -> list[Any]:
    return [row.values for row in read(path).rows]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_kind_of_text_file_gives_the_same_rows(tmp_path: Path, name: str, ending: str) -> None:
    content = TEXTS[name].encode()
    zstandard = pa.Codec("zstd").compress(content, asbytes=True)
    compressed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda _: zstandard}
    path = tmp_path / (name + ending)
    path.write_bytes(compressed[ending](content) if ending else content)
    assert values(path) == ROWS
    assert read(path).columns == ("question", "answer")


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow", "a.feather"])
def test_every_kind_of_binary_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    table, path = pa.Table.from_pylist(ROWS), tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path)
    elif name == "a.feather":
        pyarrow.feather.write_feather(table, path)
    else:
        writer = pa.ipc.new_stream if name == "stream.arrow" else pa.ipc.new_file
        with writer(path, table.schema) as out:
            out.write_table(table)
    assert values(path) == ROWS
    assert [row.number for row in read(path).rows] == [1, 2]


@pytest.mark.parametrize("number", ["1e-07", "0.0000001", "2.50", "1E5", "100000000000000000000000.0", "-0.10"])
def test_a_number_of_a_json_file_keeps_its_text(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"answer": {number}}}\n')
    [row] = values(path)
    assert str(row["answer"]) == number
    assert row["answer"] == float(number)


def test_numbers_of_a_parquet_file_have_their_own_digits(tmp_path: Path) -> None:
    columns = {
        "single": pa.array([0.1, None], pa.float32()),
        "double": pa.array([1e-07, 0.1], pa.float64()),
        "decimal": pa.array([Decimal("2.50"), None], pa.decimal128(9, 2)),
        "whole": pa.array([7, 8], pa.int8()),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = values(tmp_path / "a.parquet")
    assert first == {"single": 0.1, "double": 1e-07, "decimal": Decimal("2.50"), "whole": 7}
    assert second["single"] is None


def test_a_csv_row_with_too_few_or_too_many_cells_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\na\nb,1\nc,1,2\n")
    assert values(path) == ["expected 2 cells, found 1", {"question": "b", "answer": "1"}, "expected 2 cells, found 3"]


def test_a_csv_cell_may_be_long_and_its_bytes_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer\n" + b"x" * 200_000 + b",1\nb,\xff\n")
    first, second = values(path)
    assert len(first["question"]) == 200_000
    assert second["answer"].encode("utf-8", "ignore") == b""  # not text, which the task then says


def test_unreadable_lines_of_json_lines_stay_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{broken\n{"a": 1}\n[1]\n')
    first, second, third = values(path)
    assert first == "not JSON: Expecting property name enclosed in double quotes at column 2"
    assert (second, third) == ({"a": 1}, "expected a JSON object, found list")


def test_a_line_that_ends_too_early_has_the_column_behind_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n\n')
    assert values(path)[1] == "not JSON: Expecting value at column 6"
    (tmp_path / "a.json").write_text('\n[\n\n{"a": }]')
    with pytest.raises(DataError, match="expected one JSON array, found not JSON: Expecting value at line 4 column 7$"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.csv", 'a,b\n1,"2\n3"\n\n4,5\n', [":2", ":5"]),
        ("a.tsv", "a\tb\r\n1\t2\r\n\r\n4\t5", [":2", ":4"]),
        ("b.csv", '"a\nx",b\r1,2\r4,5', [":3", ":4"]),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', [":1", ":3"]),
        ("a.json", '[{"a": 1},\n{"a": 2}]', [", row 1", ", row 2"]),
    ],
)
def test_a_row_is_named_by_its_line_or_else_by_its_number(
    tmp_path: Path, name: str, text: str, places: list[str]
) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert [row.place("x") for row in read(tmp_path / name).rows] == [f"x{place}" for place in places]


def test_entries_of_an_array_that_are_no_objects_stay_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n 2]')
    assert values(path) == [{"a": 1}, "expected a JSON object, found int"]


BAD = {
    "a.xlsx": (b"PK\x03\x04 not a table", r"expected a file \.jsonl, .*\.csv.*\.gz"),
    "a.json": (b'{\n "version": 1,\n "data": [{"a": 1}]\n}', "found one object: version, data"),
    "a.jsonl.gz": (b"not gzip", "cannot be read: Not a gzipped file"),
    "b.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 99)[:-9], "cannot be read: "),
    "a.csv.xz": (b"not xz", "cannot be read: "),
    "a.csv.zst": (b"not zstandard", "cannot be read: "),
    "a.arrow": (b"no arrow", "not a readable Arrow file"),
    "a.parquet.gz": (gzip.compress(b"no parquet"), "not a readable Parquet file"),
    "a.csv": (b"a,b,a\n1,2,3\n", "column a: expected it once, found it 2 times"),
    "b.csv": (b'a,b\n1,2\n\n1,"2" x\n', "not readable from line 4 on"),
    "c.csv": (b"a,b\n", "expected at least one row, found none"),
    "b.json": (b"[]", "expected at least one row, found none"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_says_why_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert caught.value.message.startswith(f"task.path {tmp_path / name}: ") or "column a" in message
    assert "\n" not in caught.value.message
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / f"missing-{name}")


@pytest.mark.heavy
def test_folders_keep_the_texts_of_csv_and_follow_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "train.csv").write_text("question,answer\nq,007\nr,NA\n")
    (folder / "test.csv").write_text("question,answer\ns,1.50\n")
    assert values(folder) == [{"question": "q", "answer": "007"}, {"question": "r", "answer": "NA"}]
    with pytest.raises(DataError, match="has no split 'dev'; the splits are train, test"):
        read_source(str(folder), "dev", "task.path")

    hub = tmp_path / "datasets--a--b"
    for name in ("blobs", "refs", "snapshots/1", "snapshots/2"):
        (hub / name).mkdir(parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), hub / "blobs" / "x")
    (hub / "snapshots" / "1" / "train.parquet").symlink_to("../../blobs/x")
    (hub / "refs" / "main").write_text("1\n")
    assert values(hub) == ROWS
    [cached] = (tmp_path / "cache").glob("*/*/*/*/*-train.arrow")
    assert values(cached) == ROWS
    assert values(cached.parent) == ROWS


def test_values_that_python_cannot_hold_are_missing_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pa.array([-(10**15), 0], pa.timestamp("s"))
    places = pa.array([0, 0], pa.timestamp("s", tz="Mars/Base"))
    pyarrow.parquet.write_table(pa.table({"question": ["a", "b"], "time": times, "place": places}), path)
    rows = values(path)
    assert [row["question"] for row in rows] == ["a", "b"]
    assert [row["time"] is None for row in rows] == [True, False]
    assert [row["place"] for row in rows] == [None, None]


def test_short_numbers_in_lists_and_nested_columns_have_their_own_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    short = pa.array([0.1, None], pa.float32())
    nested = pa.StructArray.from_arrays([short, pa.array(["x", "y"])], ["truth", "style"])
    listed = pa.array([[0.1], []], pa.list_(pa.float16()))
    pairs = pa.array([[("a", "1")], []], pa.map_(pa.string(), pa.string()))
    table = pa.table({"flat": short, "nested": nested, "listed": listed, "map": pairs})
    pyarrow.parquet.write_table(table, path)
    assert values(path)[0] == {"flat": 0.1, "nested": {"truth": 0.1, "style": "x"}, "listed": [0.1], "map": {"a": "1"}}
    assert values(path)[1] == {"flat": None, "nested": {"truth": None, "style": "y"}, "listed": [], "map": {}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question;answer\na;b\n", "expected columns separated by commas, found the header 'question;answer'"),
        ("a.tsv", "question,answer\na,b\n", "expected columns separated by tabs, found the header 'question,answer'"),
        ("a.tsv", 'question\tanswer\n"a" b\tc\n', "a cell that begins with a quotation mark must end with one"),
        ("a.json", '[\n{"question": "a"},\n', "expected one JSON array, found not JSON: Expecting value"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid x\n", "found a Git LFS pointer; run git lfs pull"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid x\n", "found a Git LFS pointer; run git lfs"),
    ],
)
def test_the_message_says_what_is_wrong_with_the_whole_file(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "a.txt", "a.csv", "A.TSV"])
def test_a_file_of_another_encoding_is_refused_as_a_whole(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes(TEXTS[name].removeprefix("\ufeff").encode(encoding))
    with pytest.raises(DataError, match=rf"expected a file in UTF-8, found {encoding[:6].upper()}; save it as UTF-8$"):
        read(path)


def test_a_byte_that_is_not_utf_8_is_shown_as_a_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("question,answer\nWie groß?,2\n".encode("latin-1"))
    values = read(path).rows[0].values
    assert isinstance(values, dict)
    assert described(values["question"]) == r"bytes that are not UTF-8 in 'Wie gro\xdf?'"
    assert described("a\ud800") == r"half a surrogate pair in 'a\ud800'"
