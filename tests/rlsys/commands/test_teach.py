"""`rlsys teach`: what it refuses, and the columns of scored rows."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from minimal_config import minimal_with

from rlsys.commands import teach
from rlsys.data.ragged import ragged
from rlsys.data.rows import SupervisedRows
from rlsys.errors import ConfigError

DISTILL = "objective.distill={weight: 1, divergence: top_k, top_k: 2, on_policy_share: 0}"
TEACHER = "teacher.model={path: t}"
STAGES = "stages=[sft]"


class Engine:
    """An engine whose two most probable tokens after the place p of a row are 10 p and 10 p + 1."""

    def token_scores(self, rows: list[np.ndarray], tokens: int) -> list[Future[Any]]:
        futures = []
        for row in rows:
            places = np.arange(len(row) - 1)[:, None]
            future: Future[Any] = Future()
            future.set_result((10 * places + np.arange(tokens), -(places + 0.5 * np.arange(tokens))))
            futures.append(future)
        return futures


def test_the_scores_stand_beside_the_trained_tokens() -> None:
    rows = SupervisedRows(
        ragged([[5, 6, 7, 8], [5, 9]], np.int32), ragged([[False, True, False, True], [True, True]], np.bool_)
    )
    columns = teach.scored(Engine(), rows, range(2), 2)
    assert columns["token_ids"] == [[5, 6, 7, 8], [5, 9]]
    assert columns["loss_mask"] == [[False, True, False, True], [False, True]]  # nothing predicts a first token
    assert columns["teacher_ids"] == [[0, 1, 20, 21], [0, 1]]  # of the tokens before the trained ones
    assert columns["teacher_logprobs"] == [[0.0, -0.5, -2.0, -2.5], [0.0, -0.5]]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ([STAGES, DISTILL, TEACHER], "stage sft has no data: set sft.path"),
        ([STAGES, DISTILL, "sft.path=rows.parquet", "model={path: null, from_scratch: {}}", TEACHER], "model.path"),
        ([STAGES, DISTILL, "sft.path=rows.parquet"], "teacher.model.path"),
    ],
)
def test_what_is_missing_is_named(overrides: list[str], field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=field):
        teach.run(minimal_with(overrides), tmp_path / "scored.parquet")
    assert list(tmp_path.iterdir()) == []
