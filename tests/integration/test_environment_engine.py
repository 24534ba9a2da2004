"""Episodes of a running vLLM engine: tokens, log-probabilities after forced texts, and repetition in other batches."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(200)]
HERE = Path(__file__).parent
ROUNDING = 2e-5  # fp32 log-probabilities summed in another order


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "environment_child.py"), str(tmp_path_factory.mktemp("model"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_turn_is_answered_and_nothing_is_tokenised_again(measured: dict[str, Any]) -> None:
    rows = [(name, row) for name, group in measured["rows"].items() for row in group]
    for name, row in rows:
        number = list(measured["rows"]).index(name)
        assert row["text"].startswith(name) and row["outcome"] == "wrong"
        rest = row["text"].removeprefix(name)
        turns = re.split(rf"<{number}:\d+>", rest)
        # A turn ends with the token that has the first letter, such as <user>. An end token ends the episode.
        assert "".join(turns) == row["own"] and len(turns) == row["turns"] == len(row["starts"])
        assert all(re.fullmatch(r"[^a-z]*([a-z]|<(assistant|user|pad)>)", turn, re.DOTALL) for turn in turns[:-1])
        lengths = [int(length) for length in re.findall(rf"<{number}:(\d+)>", rest)]
        assert lengths == [len(turn) for turn in turns[:-1]]
    assert len({row["turns"] for _, row in rows}) > 1
    assert measured["cached"] > 0, "later turns find the earlier ones in the prefix cache"


def test_log_probabilities_are_given_the_forced_texts(measured: dict[str, Any]) -> None:
    for row in (row for group in measured["rows"].values() for row in group):
        assert len(row["sampled"]) == len(row["learned"])
        assert max(abs(a - b) for a, b in zip(row["sampled"], row["learned"], strict=True)) < ROUNDING


def test_episodes_do_not_depend_on_others_in_the_batch(measured: dict[str, Any]) -> None:
    assert len(measured["repeated"]) == 3
    for name, group in measured["repeated"].items():
        for row, before in zip(group, measured["rows"][name], strict=True):
            assert row["tokens"] == before["tokens"] and row["sampled"] == before["sampled"]
