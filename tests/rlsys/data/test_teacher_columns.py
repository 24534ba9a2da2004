"""Scores of a teacher in files: what is read, and errors that name row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlsys.data.rows import Reader
from rlsys.data.teacher_columns import ExpectedScores
from rlsys.errors import DataError

LOGS = [-0.5, -1.5, -0.25, -2.0, -1.0, -1.25]


def reader(optional: bool = False, longest: int = 12) -> Reader:
    scores = ExpectedScores(tokens=2, tokenizer="abc", optional=optional)
    return Reader(None, vocabulary=27, longest=longest, scores=scores)


def row(**changes: Any) -> dict[str, Any]:
    """Return a row of four tokens, the second and the last of which are trained."""
    values = {
        "token_ids": [1, 2, 3, 4],
        "loss_mask": [False, True, False, True],
        "teacher_ids": [2, 9, 4, 7],
        "teacher_logprobs": LOGS[:4],
        "tokenizer": "abc",
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return str(path)


def test_the_scores_stand_at_the_trained_tokens(tmp_path: Path) -> None:
    other = row(token_ids=[5, 6, 7, 8], loss_mask=[False, True, True, True], teacher_ids=list(range(6)))
    rows = [row(), {**other, "teacher_logprobs": LOGS}, row(token_ids=[1] * 4)]
    found = reader().supervised(write(tmp_path, *rows), "sft.path")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    same = reader().supervised(str(tmp_path / "rows.parquet"), "sft.path")
    assert found.digest() == same.digest()
    first, second = found.row(0).teacher, found.row(1).teacher
    assert first is not None and second is not None
    assert first.mask.tolist() == [False, True, False, True] and first.ids.tolist() == [[0, 0], [2, 9], [0, 0], [4, 7]]
    assert first.logprobs.tolist() == [[0, 0], [-0.5, -1.5], [0, 0], [-0.25, -2.0]]
    assert second.ids[1:].tolist() == [[0, 1], [2, 3], [4, 5]] and second.logprobs.dtype == np.float32


def test_rows_that_are_too_long_take_their_scores_with_them(tmp_path: Path) -> None:
    long = row(token_ids=[1] * 5, loss_mask=[False, True, False, True, False])
    path = write(tmp_path, long, row(teacher_ids=[1, 2, 3, 4]))
    (found,) = [reader(longest=4).supervised(path, "sft.path", max_bad_rows=0.5)]
    scores = found.row(0).teacher
    assert len(found) == 1 and scores is not None and scores.ids[3].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "xyz"}, "column tokenizer: expected abc, the tokenizer of the policy, found xyz"),
        (
            {"teacher_ids": [2, 9, 4]},
            "column teacher_ids: expected objective.distill.top_k = 2 entries for each of the 2 tokens to train, found",
        ),
        ({"teacher_logprobs": LOGS}, "column teacher_logprobs: expected objective.distill.top_k = 2 entries"),
        ({"teacher_ids": [2, 9, 4, 27]}, "column teacher_ids: expected token ids from 0 to 26"),
        ({"teacher_logprobs": [-0.5, -0.1, -1.0, -1.0]}, "column teacher_logprobs: expected natural logarithms of"),
        ({"teacher_logprobs": [-0.5, float("nan"), -1.0, -1.0]}, "column teacher_logprobs: expected natural logarithm"),
        ({"teacher_logprobs": ["a"] * 4}, "column teacher_logprobs: expected a list of numbers, found a list"),
    ],
)
def test_wrong_scores_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        reader().supervised(write(tmp_path, row(), row(**changes)), "sft.path")
    assert "row 2, " + message in caught.value.message


def test_a_file_without_scores_needs_engines(tmp_path: Path) -> None:
    path = write(tmp_path, row(teacher_ids=None))
    assert reader(optional=True).supervised(path, "sft.path").row(0).teacher is None
    with pytest.raises(DataError, match="expected the columns token_ids, loss_mask, teacher_ids, .* set teacher.model"):
        reader().supervised(path, "sft.path")


def test_a_run_without_the_term_does_not_read_the_scores(tmp_path: Path) -> None:
    path = write(tmp_path, row(tokenizer="xyz"))
    assert Reader(None, vocabulary=27, longest=12).supervised(path, "sft.path").row(0).teacher is None
