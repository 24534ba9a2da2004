"""TRL and peft open what `rlsys extract` and `rlsys export` write, in a process of their own.

See tests/learners/objective/test_trl_parity.py for the reason.
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
COMPARISONS = 3


@pytest.mark.long
def test_trl_trains_on_the_tables_and_peft_opens_an_exported_adapter() -> None:
    assert (TRL / "trl").is_dir(), f"{TRL} lacks TRL: run make install"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TRL}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/peers/trl_tables.py"]
    completed = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert completed.returncode == 0, completed.stdout[-5000:] + completed.stderr[-2000:]
    assert re.search(rf"^{COMPARISONS} passed", completed.stdout, re.MULTILINE), completed.stdout[-500:]
