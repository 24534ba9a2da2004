"""The losses of TRL's own trainers, compared in a process of their own.

TRL needs accelerate, and where that can be imported transformers imports DeepSpeed with it, in every process: seconds
for each, and a warning on standard output. So both are in a folder of their own that only this test looks into.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TRL = Path(sys.prefix) / "trl"  # `make install` puts requirements-trl.lock there
PEERS = ("tests/peers/trl_parity.py", "tests/peers/trl_distillation.py")
COMPARISONS = 21


@pytest.mark.long
def test_losses_and_gradients_equal_those_of_trl() -> None:
    assert (TRL / "trl").is_dir(), f"{TRL} lacks TRL: run make install"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TRL}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PEERS]
    completed = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert completed.returncode == 0, completed.stdout[-5000:] + completed.stderr[-2000:]
    assert re.search(rf"^{COMPARISONS} passed", completed.stdout, re.MULTILINE), completed.stdout[-500:]
