"""Training rows from files: their content, pairs that are left out, and errors that name the row."""

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
    """Tokenizer of letters: a is 1, b is 2, and so on. 0 is the end token, whose text is $."""

    eos_token_id = 0
    chat_template = None

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


def demo(*ids: int, prompt: int = 1, **changes: Any) -> dict[str, Any]:
    return {"token_ids": list(ids), "loss_mask": [place >= prompt for place in range(len(ids))], **changes}


def pair(chosen: list[int], rejected: list[int], prompt: int, common: int, **changes: Any) -> dict[str, Any]:
    return {"chosen_ids": chosen, "rejected_ids": rejected, "prompt_length": prompt, "common_prefix": common, **changes}


def test_rows_of_ids(write: Write) -> None:
    rows = supervised(write([demo(1, 2, 3, 0, prompt=2), demo(4, 0)]))
    assert len(rows) == 2
    assert [rows.row(n).token_ids.tolist() for n in range(2)] == [[1, 2, 3, 0], [4, 0]]
    assert [rows.row(n).loss_mask.tolist() for n in range(2)] == [[False, False, True, True], [False, True]]
    assert rows.row(0).token_ids.dtype == np.int32 and rows.row(0).loss_mask.dtype == np.bool_


def test_rows_of_text_are_encoded_as_they_are_and_ended_once(write: Write) -> None:
    rows = supervised(write([{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "b$", "other": "x"}]))
    assert [rows.row(n).token_ids.tolist() for n in range(2)] == [[1, 2, 3, 0], [1, 2, 0]]
    assert [rows.row(n).loss_mask.tolist() for n in range(2)] == [[False, False, True, True], [False, True, True]]


def test_id_columns_take_precedence_over_text(write: Write) -> None:
    assert supervised(write([demo(5, 6, prompt=1) | {"prompt": "a", "completion": "b"}])).row(0).token_ids[0] == 5


def test_pairs_of_ids(write: Write) -> None:
    visits = {"chosen_visits": 4, "rejected_visits": 0}
    rows = pairs(write([pair([1, 2, 3, 0], [1, 2, 0], 1, 2, **visits), pair([7, 8], [7, 9], 1, 1)]))
    first, second = rows.row(0), rows.row(1, reference=(-1.5, -2.5))
    assert (first.chosen_ids.tolist(), first.rejected_ids.tolist()) == ([1, 2, 3, 0], [1, 2, 0])
    assert (first.prompt_length, first.common, first.chosen_visits, first.rejected_visits) == (1, 2, 4, 0)
    assert (second.chosen_visits, second.rejected_visits) == (None, None)
    assert (first.chosen_reference, second.chosen_reference, second.rejected_reference) == (None, -1.5, -2.5)
    assert rows.notes == ()


def test_masks_of_pairs_leave_out_replies(write: Write) -> None:
    written = [True, True, False, True]
    masked = pair([1, 2, 3, 0], [1, 2, 4, 0], 1, 2, chosen_mask=written, rejected_mask=[True] * 4)
    others = [pair([7, 8], [7, 9], 1, 1), pair([5, 8], [5, 9], 1, 1, chosen_mask=None)]
    rows = pairs(write([masked, *others]))
    assert [rows.row(n).chosen_mask is None for n in range(3)] == [False, True, True]
    mask = rows.row(0).chosen_mask
    assert mask is not None and mask.tolist() == written
    assert rows.row(0).rejected_mask is None, "a mask without a reply says nothing"
    assert rows.digest() != pairs(write([masked | {"chosen_mask": [True] * 4}, *others])).digest()


def test_optional_columns_may_have_no_value(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([pair([1, 2], [1, 3], 1, 1)])
    for name in ("chosen_visits", "rejected_visits", "chosen_mask", "rejected_mask"):
        table = table.append_column(name, pa.nulls(1))
    pq.write_table(table, tmp_path / "rows.parquet")
    row = pairs(tmp_path / "rows.parquet").row(0)
    assert (row.chosen_visits, row.chosen_mask) == (None, None)


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
    # A node is not the end of its chain, so no end token follows.
    assert (steps.chosen_ids.tolist(), steps.rejected_ids.tolist()) == ([1, 2, 3, 4], [1, 2, 3, 5])
    assert (steps.prompt_length, steps.common, steps.chosen_visits) == (2, 3, 2)


def test_pairs_without_a_difference_are_left_out_and_counted(write: Write) -> None:
    good = pair([1, 2, 0], [1, 3, 0], 1, 1)
    equal, ended = pair([1, 2, 0], [1, 2, 0], 1, 3), pair([1, 2], [1, 2, 3], 1, 2)
    rows = pairs(path := write([equal, good, ended, equal]))
    assert len(rows) == 1 and rows.row(0).rejected_ids.tolist() == [1, 3, 0]
    assert rows.notes == (
        f"preference.path {path}: 3 of 4 pairs left out: 2 whose sides are equal, 1 with no token after the common "
        "prefix",
    )
    with pytest.raises(DataError, match=r"preference\.path .*: expected pairs of two chains, found 1 whose sides"):
        pairs(write([equal]))


def test_rows_of_many_batches_stay_in_order(write: Write) -> None:
    count = 2 * BATCH + 3
    rows = supervised(write([demo(1 + n % 26, *[2] * (n % 5), 0) for n in range(count)]))
    for n in (0, BATCH - 1, BATCH, count - 1):
        assert rows.row(n).token_ids.tolist() == [1 + n % 26, *[2] * (n % 5), 0]
    pair_rows = [pair([1, 2 + n % 20, 0], [1, 2 if n % 3 else 2 + n % 20, 0], 1, 1 if n % 3 and n % 20 else 3)
             for n in range(count)]  # fmt: skip
    read = pairs(write(pair_rows))
    different = [n for n in range(count) if n % 3 and n % 20]
    assert [int(read.row(n).chosen_ids[1]) for n in range(len(read))] == [2 + n % 20 for n in different]


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    (demo(1, 27, 0), "column token_ids: expected token ids from 0 to 26 (the policy's vocabulary), found 27"),
    (demo(1, -1, 0), "column token_ids: expected token ids from 0 to 26 (the policy's vocabulary), found -1"),
    ({"token_ids": [], "loss_mask": []}, "column token_ids: expected one token or more, found none"),
    (
        demo(1, 2, loss_mask=[False]),
        "column loss_mask: expected an entry for each of the 2 token_ids, found 1",
    ),
    (
        demo(1, 2, prompt=0),
        "column loss_mask: expected false for the first token, which nothing predicts, found true",
    ),
    (demo(1, 2, prompt=2), "column loss_mask: expected a token to train, found none"),
    (demo(1, 2, loss_mask=None), "column loss_mask: expected a list of truth values, found null"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=[message[:60] for _, message in BAD_ROWS])
def test_errors_name_file_row_and_column(write: Write, bad: dict[str, Any], message: str) -> None:
    path = write([*[demo(1, 0)] * (BATCH + 1), bad, demo(1, 0)])  # in the second batch
    with pytest.raises(DataError) as caught:
        supervised(path)
    assert caught.value.message == f"sft.path {path}, row {BATCH + 2}, {message}"


BAD_PAIRS: list[tuple[dict[str, Any], str]] = [
    (pair([1, 2], [3, 2], 1, 0), "column prompt_length: 1, but chosen_ids and rejected_ids have only 0 tokens in"),
    (pair([1, 2], [1, 3], 0, 1), "column prompt_length: expected 1 or more, found 0"),
    (pair([1, 2], [1, 3], 1, 2), "column common_prefix: expected 1, the length of their common prefix, found 2"),
    (pair([1, 2], [1, 3], 1, 1, chosen_visits=-1), "column chosen_visits: expected 0 or more, found -1"),
    (pair([1, 2], [1, 27], 1, 1), "column rejected_ids: expected token ids from 0 to 26"),
    (
        pair([1, 2], [1, 3], 1, 1, chosen_mask=[True]),
        "column chosen_mask: expected an entry for each of the 2 token ids, found 1",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD_PAIRS, ids=[message[:60] for _, message in BAD_PAIRS])
def test_errors_of_pairs(write: Write, bad: dict[str, Any], message: str) -> None:
    path = write([pair([1, 2], [1, 3], 1, 1, chosen_visits=1, chosen_mask=[True, True]), bad])
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
    assert caught.value.message.endswith(f": row 2, column {column}: expected text, found {blank!r}")


def test_an_end_token_alone_is_no_text_to_learn(write: Write) -> None:
    with pytest.raises(DataError, match=r"row 1, column completion: expected text, found '\$'"):
        supervised(write([{"prompt": "a", "completion": "$"}]))
    with pytest.raises(DataError, match=r"row 1, column chosen: expected text, found '\$'"):
        pairs(write([{"prompt": "a", "chosen": "$", "rejected": "b"}]))


def test_missing_columns_and_empty_files(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        supervised(path := write([{"prompt": "a", "loss_mask": [True]}]))
    assert caught.value.message == (
        f"sft.path {path}: expected the columns token_ids + loss_mask, or prompt + completion, or messages, or "
        "conversations, or text; found prompt-only rows: prompt, loss_mask"
    )
    with pytest.raises(DataError, match=r"chosen_ids \+ rejected_ids \+ prompt_length \+ common_prefix, or prompt_ids"):
        pairs(write([demo(1, 2)]))


def test_the_digest_is_of_the_rows_and_not_of_the_file(tmp_path: Path) -> None:
    def digest(*rows: dict[str, Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return supervised(path).digest()

    first = digest(demo(1, 2, 0), demo(3, 0))
    assert digest(demo(1, 2, 0, other=1), demo(3, 0)) == first
    others = [
        digest(demo(3, 0), demo(1, 2, 0)),
        digest(demo(1, 2, 0, prompt=2), demo(3, 0)),
        digest(demo(1, 2, 0)),
    ]
    assert len({first, *others}) == 4


def test_tables_that_extract_writes_can_be_read(tmp_path: Path) -> None:
    text = {"prompt": "a", "prompt_id": "p", "completion": "b", "chosen": "b", "rejected": "c", "pattern": "a"}
    masks = {"chosen_loss_mask": [False, True], "rejected_loss_mask": [False, True]}
    table_rows = {
        "supervised": text | demo(1, 2) | {"reward": 1.0, "length": 1, "value": 0.5},
        "preferences": text | pair([1, 2], [1, 3], 1, 1, chosen_visits=None, rejected_visits=3) | masks,
        "step_preferences": text
        | masks
        | {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "chosen_visits": 2, "rejected_visits": 1}
        | {"chosen_value": 1.0, "rejected_value": 0.0},
    }
    for table in TABLES[:3]:
        with TableFiles(tmp_path, table) as files:
            files.add(table_rows[table.name])
    for ending in ("jsonl", "parquet"):
        assert supervised(tmp_path / f"supervised.{ending}").row(0).token_ids.tolist() == [1, 2]
        rows = [pairs(tmp_path / f"{name}.{ending}").row(0) for name in ("preferences", "step_preferences")]
        assert [row.rejected_ids.tolist() for row in rows] == [[1, 3], [1, 3]]
        assert [(row.chosen_visits, row.rejected_visits) for row in rows] == [(None, 3), (2, 1)]


def test_a_large_parquet_file_is_read_in_a_moment(tmp_path: Path) -> None:
    # 10,000 rows take 0.1 s on one core of a busy machine. Row by row in Python they would take seconds.
    ids = pa.array(np.ones(10_000 * 10, dtype=np.int32))
    starts = pa.array(np.arange(0, 10_000 * 10 + 1, 10, dtype=np.int32))
    mask = pa.array(np.tile(np.arange(10) > 4, 10_000))
    lists = {"token_ids": pa.ListArray.from_arrays(starts, ids), "loss_mask": pa.ListArray.from_arrays(starts, mask)}
    pq.write_table(pa.table(lists), tmp_path / "rows.parquet")
    started = time.perf_counter()
    assert len(supervised(tmp_path / "rows.parquet")) == 10_000
    assert time.perf_counter() - started < 2
