"""A bf16 learner sums the gradients of many passes in fp32, with the real DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accumulation_child import LARGE, PASSES, SMALL

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
HERE = Path(__file__).parent


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (2, 3))])
def test_small_gradients_are_not_lost_beside_a_large_one(tmp_path: Path, stage: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, str(HERE / "accumulation_child.py"), str(stage), str(tmp_path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A sum in bf16 stays at LARGE, because LARGE + SMALL is rounded to it.
    assert json.loads(done.stderr.splitlines()[-1]) == pytest.approx(LARGE + PASSES * SMALL, rel=1e-6)
