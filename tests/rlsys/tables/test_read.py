"""Row files in batches: what can be read, and errors that name file, row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlsys.errors import DataError
from rlsys.tables.read import Batch, RowFile
from rlsys.tables.schemas import SUPERVISED
from rlsys.tables.sources import Part

IDS, TEXTS = SUPERVISED.subset("token_ids", "loss_mask"), SUPERVISED.subset("prompt", "completion")
TYPES = {"token_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
GOOD = json.dumps({"token_ids": [1, 2], "loss_mask": [False, True]})


def read(path: Path) -> list[Batch]:
    """Read all batches and their token ids, in the first layout of ids and texts that fits."""
    file = RowFile(str(path), "sft.path")
    layout = file.layout([IDS, TEXTS])
    assert layout is not None
    batches = list(file.batches(layout))
    if layout is IDS:
        for batch in batches:
            batch.ids("token_ids")
    return batches


def write_parquet(path: Path, columns: dict[str, list[Any]], types: dict[str, pa.DataType]) -> Path:
    pq.write_table(pa.table({name: pa.array(columns.get(name, []), kind) for name, kind in types.items()}), path)
    return path


@pytest.mark.parametrize(
    ("column", "kind", "name"),
    [
        ("token_ids", pa.list_(pa.float64()), "list<element: double>"),
        ("token_ids", pa.list_(pa.uint64()), "list<element: uint64>"),
        ("token_ids", pa.string(), "string"),
        ("loss_mask", pa.list_(pa.int8()), "list<element: int8>"),
    ],
)
def test_a_parquet_column_of_another_type_is_refused(tmp_path: Path, column: str, kind: pa.DataType, name: str) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {}, {**TYPES, column: kind})
    with pytest.raises(DataError, match=rf"column {column}: expected a list of .*, found {name}"):
        read(path)


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.list_(pa.uint16()), pa.large_list(pa.int32())])
def test_a_parquet_column_of_other_integers_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"token_ids": [[1, 2]], "loss_mask": [[False, True]]}
    path = write_parquet(tmp_path / "rows.parquet", columns, {**TYPES, "token_ids": kind})
    assert read(path)[0].ids("token_ids")[0].tolist() == [1, 2]


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected at least one row, found none"):
        read(write_parquet(tmp_path / "rows.parquet", {}, TYPES))


def test_a_null_in_a_list_is_refused(tmp_path: Path) -> None:
    columns = {"token_ids": [[1, 2], [1, None]], "loss_mask": [[False, True]] * 2}
    path = write_parquet(tmp_path / "rows.parquet", columns, TYPES)
    with pytest.raises(DataError, match="row 2, column token_ids: expected no null in the list, found one"):
        read(path)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(path)


def test_a_parquet_file_with_a_repeated_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    names = ["prompt", "completion", "completion"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=names), path)
    with pytest.raises(DataError, match=r"rows\.parquet, column completion: expected it once, found it 2 times"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 3: not JSON"),
        ("[1]", "row 3: expected a JSON object, found list"),
        ("\udcff", "row 3: not UTF-8"),
        (
            '{"token_ids": [1, true], "loss_mask": [false, true]}',
            "row 3, column token_ids: .* a list of bool, int",
        ),
        ('{"token_ids": [1, 2.0], "loss_mask": [false, true]}', "row 3, column token_ids: .* a list of float, int"),
        ('{"token_ids": "12", "loss_mask": [false, true]}', "row 3, column token_ids: .* found str '12'"),
        ('{"loss_mask": [false, true]}', "row 3, column token_ids: .* found no such column in this row"),
        ('{"token_ids": [1, 2], "loss_mask": [0, 1]}', "row 3, column loss_mask: .* found a list of int"),
        (
            '{"token_ids": [1, 2], "loss_mask": [false, true], "token_ids": [1, 3]}',
            "row 3: column token_ids: expected it once in a row, found it twice",
        ),
        (f'{{"token_ids": [1, {2**70}], "loss_mask": [false, true]}}', "row 3, column token_ids: .* more than 64 bits"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n", errors="surrogateescape")  # an empty line counts as a line, not as a row
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_file_of_empty_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="expected at least one row, found none"):
        read(path)


def test_half_a_surrogate_pair_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # A whole pair is one character. Columns that are not read can hold anything.
    path.write_text('{"prompt": "a", "completion": "b\\ud83d\\ude00", "other": "\\ud800"}\n')
    assert len(read(path)[0].texts("completion")) == 1
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b\\ud800"}\n')
    with pytest.raises(
        DataError, match=r"row 2, column completion: expected text, found half a surrogate pair in 'b\\ud800'$"
    ):
        read(path)


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sft\.path .*rows\.jsonl: no such file"):
        read(tmp_path / "rows.jsonl")


def test_a_path_can_have_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    monkeypatch.setenv("ROWS", str(tmp_path))
    assert len(read(Path("${ROWS}/rows.jsonl"))) == 1


def test_the_first_row_alone_does_not_decide_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"id": 1}, {"prompt": "a"}, {"completion": "b"})))
    assert RowFile(str(path), "sft.path").names() == ["id", "prompt", "completion"]


def test_the_part_of_a_data_set_can_be_chosen(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"train_sft": [{"text": "a"}], "test_sft": [{"text": "b"}, {"text": "c"}]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(each) for name, each in rows.items()}).save_to_disk(
        str(tmp_path / "d")
    )
    file = RowFile(str(tmp_path / "d"), "sft.path", Part(split="test_sft"))
    assert [row.values for row in file.rows()] == rows["test_sft"]
    with pytest.raises(DataError, match="has no split 'train'; the splits are train_sft, test_sft"):
        list(RowFile(str(tmp_path / "d"), "sft.path").rows())


def test_a_missing_subset_names_the_own_field(tmp_path: Path) -> None:
    files = {name: [{"split": "train", "path": f"{name}.jsonl"}] for name in ("main", "small")}
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in files)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name in files:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    with pytest.raises(DataError, match=r"^preference\.path .*set preference\.subset: .*'main', 'small'"):
        list(RowFile(str(tmp_path), "preference.path").rows())
    rows = RowFile(str(tmp_path), "preference.path", Part(subset="small")).rows()
    assert [row.values for row in rows] == [{"text": "small"}]


def test_the_cause_of_an_unreadable_data_set_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{bad")
    with pytest.raises(DataError) as caught:
        list(RowFile(str(tmp_path), "sft.path").rows())
    assert "An error occurred while generating" not in caught.value.message
    assert "\n" not in caught.value.message
