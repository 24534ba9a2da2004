"""Rows to train on, out of files: what is read, what is left out, and errors that name the row."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlsys.data.rows import PairRows, Reader, SupervisedRows
from rlsys.errors import DataError
from rlsys.tables.read import BATCH
from rlsys.tables.schemas import TABLES
from rlsys.tables.write import TableFiles

Rows = list[dict[str, Any]]
Write = Callable[[Rows], Path]


class Letters:
    """A tokenizer of letters: a is 1, b is 2; 0 is the end token, which is also written as $."""

    eos_token_id = 0

    def __call__(self, texts: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[0 if letter == "$" else ord(letter) - 96 for letter in text] for text in texts]}


READER = Reader(Letters(), vocabulary=27, longest=12)


@pytest.fixture(params=["jsonl", "parquet"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    def file(rows: Rows) -> Path:
        path = tmp_path / f"rows.{request.param}"
        if request.param == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    return file


def supervised(path: Path) -> SupervisedRows:
    return READER.supervised(str(path), "sft.path")


def pairs(path: Path) -> PairRows:
    return READER.pairs(str(path), "preference.path")


def own(*ids: int, prompt: int = 1, **changes: Any) -> dict[str, Any]:
    return {"token_ids": list(ids), "loss_mask": [place >= prompt for place in range(len(ids))], **changes}


def pair(chosen: list[int], rejected: list[int], prompt: int, common: int, **changes: Any) -> dict[str, Any]:
    return {"chosen_ids": chosen, "rejected_ids": rejected, "prompt_length": prompt, "common_prefix": common, **changes}


def test_rows_of_ids(write: Write) -> None:
    rows = supervised(write([own(1, 2, 3, 0, prompt=2), own(4, 0)]))
    assert len(rows) == 2
    assert [rows.row(n).token_ids.tolist() for n in range(2)] == [[1, 2, 3, 0], [4, 0]]
    assert [rows.row(n).loss_mask.tolist() for n in range(2)] == [[False, False, True, True], [False, True]]
    assert rows.row(0).token_ids.dtype == np.int32 and rows.row(0).loss_mask.dtype == np.bool_


def test_rows_of_text_are_encoded_as_they_are_and_ended_once(write: Write) -> None:
    rows = supervised(write([{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "b$", "other": "x"}]))
    assert [rows.row(n).token_ids.tolist() for n in range(2)] == [[1, 2, 3, 0], [1, 2, 0]]
    assert [rows.row(n).loss_mask.tolist() for n in range(2)] == [[False, False, True, True], [False, True, True]]


def test_ids_go_before_text(write: Write) -> None:
    assert supervised(write([own(5, 6, prompt=1) | {"prompt": "a", "completion": "b"}])).row(0).token_ids[0] == 5


def test_pairs_of_ids(write: Write) -> None:
    visits = {"chosen_visits": 4, "rejected_visits": 0}
    found = pairs(write([pair([1, 2, 3, 0], [1, 2, 0], 1, 2, **visits), pair([7, 8], [7, 9], 1, 1)]))
    first, second = found.row(0), found.row(1, reference=(-1.5, -2.5))
    assert (first.chosen_ids.tolist(), first.rejected_ids.tolist()) == ([1, 2, 3, 0], [1, 2, 0])
    assert (first.prompt_length, first.common, first.chosen_visits, first.rejected_visits) == (1, 2, 4, 0)
    assert (second.chosen_visits, second.rejected_visits) == (None, None)
    assert (first.chosen_reference, second.chosen_reference, second.rejected_reference) == (None, -1.5, -2.5)
    assert found.notes == ()


def test_pairs_of_text_and_of_steps(write: Write) -> None:
    texts = pairs(write([{"prompt": "ab", "chosen": "cd", "rejected": "ce"}])).row(0)
    assert (texts.chosen_ids.tolist(), texts.rejected_ids.tolist()) == ([1, 2, 3, 4, 0], [1, 2, 3, 5, 0])
    assert (texts.prompt_length, texts.common) == (2, 3)
    step = {
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4],
        "rejected_ids": [3, 5],
        "chosen_visits": 2,
        "rejected_visits": 1,
    }
    steps = pairs(write([step | {"prompt": "ab", "chosen": "cd", "rejected": "ce"}])).row(0)
    # A node is not the end of its chain: nothing is put after it.
    assert (steps.chosen_ids.tolist(), steps.rejected_ids.tolist()) == ([1, 2, 3, 4], [1, 2, 3, 5])
    assert (steps.prompt_length, steps.common, steps.chosen_visits) == (2, 3, 2)


def test_pairs_that_teach_nothing_are_left_out_and_counted(write: Write) -> None:
    good = pair([1, 2, 0], [1, 3, 0], 1, 1)
    equal, ended = pair([1, 2, 0], [1, 2, 0], 1, 3), pair([1, 2], [1, 2, 3], 1, 2)
    found = pairs(path := write([equal, good, ended, equal]))
    assert len(found) == 1 and found.row(0).rejected_ids.tolist() == [1, 3, 0]
    assert found.notes == (
        f"preference.path {path}: 3 of 4 pairs left out: 2 whose sides are equal, 1 with no token after the common "
        "prefix",
    )
    with pytest.raises(DataError, match=r"preference\.path .*: expected pairs of two chains, found 1 whose sides"):
        pairs(write([equal]))


def test_rows_of_many_batches_stay_in_order(write: Write) -> None:
    count = 2 * BATCH + 3
    rows = supervised(write([own(1 + n % 26, *[2] * (n % 5), 0) for n in range(count)]))
    for n in (0, BATCH - 1, BATCH, count - 1):
        assert rows.row(n).token_ids.tolist() == [1 + n % 26, *[2] * (n % 5), 0]
    drops = [pair([1, 2 + n % 20, 0], [1, 2 if n % 3 else 2 + n % 20, 0], 1, 1 if n % 3 and n % 20 else 3)
             for n in range(count)]  # fmt: skip
    found = pairs(write(drops))
    kept = [n for n in range(count) if n % 3 and n % 20]
    assert [int(found.row(n).chosen_ids[1]) for n in range(len(found))] == [2 + n % 20 for n in kept]


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    (own(1, 27, 0), "column token_ids: expected token ids from 0 to 26 (the policy's vocabulary), found 27"),
    (own(1, -1, 0), "column token_ids: expected token ids from 0 to 26 (the policy's vocabulary), found -1"),
    (own(*[1] * 13), "column token_ids: 13 tokens with the prompt, actors.max_model_len is 12"),
    ({"token_ids": [], "loss_mask": []}, "column token_ids: expected one token or more, found none"),
    (own(1, 2, loss_mask=[False]), "column loss_mask: expected an entry for each of the 2 token_ids, found 1"),
    (own(1, 2, prompt=0), "column loss_mask: expected false for the first token, which nothing predicts, found true"),
    (own(1, 2, prompt=2), "column loss_mask: expected a token to train, found none"),
    (own(1, 2, loss_mask=None), "column loss_mask: expected a list of truth values, found null"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=[message[:60] for _, message in BAD_ROWS])
def test_errors_name_file_row_and_column(write: Write, bad: dict[str, Any], message: str) -> None:
    path = write([*[own(1, 0)] * (BATCH + 1), bad, own(1, 0)])  # in the second batch
    with pytest.raises(DataError) as caught:
        supervised(path)
    assert caught.value.message == f"sft.path {path}, row {BATCH + 2}, {message}"


BAD_PAIRS: list[tuple[dict[str, Any], str]] = [
    (pair([1, 2], [3, 2], 1, 0), "column prompt_length: 1, but chosen_ids and rejected_ids have only 0 tokens in"),
    (pair([1, 2], [1, 3], 0, 1), "column prompt_length: expected 1 or more, found 0"),
    (pair([1, 2], [1, 3], 1, 2), "column common_prefix: expected 1, the length of what both sides begin with, found 2"),
    (pair([1, 2], [1, 3], 1, 1, chosen_visits=-1), "column chosen_visits: expected 0 or more, found -1"),
    (pair([1, 2], [1, 27], 1, 1), "column rejected_ids: expected token ids from 0 to 26"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_PAIRS, ids=[message[:60] for _, message in BAD_PAIRS])
def test_errors_of_pairs(write: Write, bad: dict[str, Any], message: str) -> None:
    path = write([pair([1, 2], [1, 3], 1, 1, chosen_visits=1), bad])
    with pytest.raises(DataError) as caught:
        pairs(path)
    assert caught.value.message.startswith(f"preference.path {path}, row 2, {message}")


def test_errors_of_text(write: Write) -> None:
    with pytest.raises(DataError, match=r"row 1, column rejected: 13 tokens with the prompt, actors\.max_model_len"):
        pairs(write([{"prompt": "a", "chosen": "b", "rejected": "c" * 11}]))
    with pytest.raises(DataError, match=r"row 1, column completion: .* found null"):
        supervised(write([{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}]))


@pytest.mark.parametrize("blank", ["", " \n", "\t\u3000"])
@pytest.mark.parametrize("column", ["prompt", "completion", "chosen", "rejected"])
def test_a_blank_text_is_refused(write: Write, column: str, blank: str) -> None:
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    read = supervised if column in ("prompt", "completion") else pairs
    with pytest.raises(DataError) as caught:
        read(write([good, {**good, column: blank}]))
    assert caught.value.message.endswith(f", row 2, column {column}: expected text, found {blank!r}")


def test_an_end_token_alone_is_no_text_to_learn(write: Write) -> None:
    with pytest.raises(DataError, match=r"row 1, column completion: expected text, found '\$'"):
        supervised(write([{"prompt": "a", "completion": "$"}]))
    with pytest.raises(DataError, match=r"row 1, column chosen: expected text, found '\$'"):
        pairs(write([{"prompt": "a", "chosen": "$", "rejected": "b"}]))


def test_missing_columns_and_empty_files(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        supervised(path := write([{"prompt": "a", "loss_mask": [True]}]))
    assert caught.value.message == (
        f"sft.path {path}: expected the columns token_ids + loss_mask, or prompt + completion; found prompt, loss_mask"
    )
    with pytest.raises(DataError, match=r"chosen_ids \+ rejected_ids \+ prompt_length \+ common_prefix, or prompt_ids"):
        pairs(write([own(1, 2)]))


@pytest.mark.parametrize(
    ("column", "kind", "found"),
    [
        ("token_ids", pa.list_(pa.float64()), "list<element: double>"),
        ("token_ids", pa.string(), "string"),
        ("loss_mask", pa.list_(pa.int8()), "list<element: int8>"),
    ],
)
def test_types_of_parquet_columns(tmp_path: Path, column: str, kind: pa.DataType, found: str) -> None:
    path = tmp_path / "rows.parquet"
    types = {"token_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_()), column: kind}
    pq.write_table(pa.table({name: pa.array([], of) for name, of in types.items()}), path)
    with pytest.raises(DataError, match=rf"column {column}: expected a list of .*, found {found}"):
        supervised(path)


def test_a_parquet_file_without_rows_or_with_holes(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    types = {"token_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
    pq.write_table(pa.table({name: pa.array([], of) for name, of in types.items()}), path)
    with pytest.raises(DataError, match="expected at least one row, found none"):
        supervised(path)
    rows = {"token_ids": [[1, 2], [1, None]], "loss_mask": [[False, True]] * 2}
    pq.write_table(pa.table({name: pa.array(values, types[name]) for name, values in rows.items()}), path)
    with pytest.raises(DataError, match="row 2, column token_ids: expected no null in the list, found one"):
        supervised(path)
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        supervised(path)


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
def test_lines_of_jsonl(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(own(1, 2))
    path.write_text(f"{good}\n\n{line}\n", errors="surrogateescape")  # an empty line is no row, and counts as a line
    with pytest.raises(DataError, match=message):
        supervised(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="expected at least one row, found none"):
        supervised(path)


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # A whole pair is one character; what is not read may hold anything.
    path.write_text('{"prompt": "a", "completion": "b", "other": "\\ud83d\\ude00 \\ud800"}\n')
    assert len(supervised(path)) == 1
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b\\ud800"}\n')
    with pytest.raises(DataError, match=r"row 2, column completion: expected text, found str 'b\\ud800'$"):
        supervised(path)


def test_a_parquet_file_with_a_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    names = ["prompt", "completion", "completion"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=names), path)
    with pytest.raises(DataError, match=r"rows\.parquet, column completion: expected it once, found it 2 times"):
        supervised(path)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"sft\.path .*rows\.csv: expected a \.jsonl or \.parquet file"):
        supervised(tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"sft\.path .*rows\.jsonl: no such file"):
        supervised(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps(own(1, 2)))
    monkeypatch.setenv("ROWS", str(tmp_path))
    assert len(supervised(Path("${ROWS}/rows.jsonl"))) == 1


def test_the_digest_is_of_the_rows_and_not_of_the_file(tmp_path: Path) -> None:
    def digest(*rows: dict[str, Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return supervised(path).digest()

    first = digest(own(1, 2, 0), own(3, 0))
    assert digest(own(1, 2, 0, other=1), own(3, 0)) == first
    others = [digest(own(3, 0), own(1, 2, 0)), digest(own(1, 2, 0, prompt=2), own(3, 0)), digest(own(1, 2, 0))]
    assert len({first, *others}) == 4


def test_what_extract_writes_can_be_read(tmp_path: Path) -> None:
    text = {"prompt": "a", "prompt_id": "p", "completion": "b", "chosen": "b", "rejected": "c", "pattern": "a"}
    masks = {"chosen_loss_mask": [False, True], "rejected_loss_mask": [False, True]}
    rows = {
        "supervised": text | own(1, 2) | {"reward": 1.0, "length": 1, "value": 0.5},
        "preferences": text | pair([1, 2], [1, 3], 1, 1, chosen_visits=None, rejected_visits=3) | masks,
        "step_preferences": text
        | masks
        | {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "chosen_visits": 2, "rejected_visits": 1}
        | {"chosen_value": 1.0, "rejected_value": 0.0},
    }
    for table in TABLES[:3]:
        with TableFiles(tmp_path, table) as files:
            files.add(rows[table.name])
    for ending in ("jsonl", "parquet"):
        assert supervised(tmp_path / f"supervised.{ending}").row(0).token_ids.tolist() == [1, 2]
        found = [pairs(tmp_path / f"{name}.{ending}").row(0) for name in ("preferences", "step_preferences")]
        assert [one.rejected_ids.tolist() for one in found] == [[1, 3], [1, 3]]
        assert [(one.chosen_visits, one.rejected_visits) for one in found] == [(None, 3), (2, 1)]


def test_a_large_parquet_file_is_read_in_a_moment(tmp_path: Path) -> None:
    # A tenth of 100,000 rows: 0.1 s on one core of a busy machine; row by row in Python it would be seconds.
    ids = pa.array(np.ones(10_000 * 10, dtype=np.int32))
    starts = pa.array(np.arange(0, 10_000 * 10 + 1, 10, dtype=np.int32))
    mask = pa.array(np.tile(np.arange(10) > 4, 10_000))
    lists = {"token_ids": pa.ListArray.from_arrays(starts, ids), "loss_mask": pa.ListArray.from_arrays(starts, mask)}
    pq.write_table(pa.table(lists), tmp_path / "rows.parquet")
    started = time.perf_counter()
    assert len(supervised(tmp_path / "rows.parquet")) == 10_000
    assert time.perf_counter() - started < 2
