"""The guide: its files and commands, run one after the other in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```(python|yaml|sh)\n(.*?)```", re.DOTALL)
NAME = re.compile(r'(?:"""|# )([\w.]+)')
SAID = {
    "rlsys check additions.yaml\n": "task.path: 100 of 3800 training rows left out: their questions are held out",
    "rlsys train additions.yaml\n": "held-out: greedy accuracy",
    "rlsys status": "finished: all steps are made",
    "rlsys show": "rollouts of step 4",
    "rlsys check additions.yaml run.dir=runs/brief": "brevity -",
    "rlsys train additions.yaml run.dir=runs/brief": "online 4/4",
    "rlsys evaluate": "difference to A",
    "rlsys export": "adder",
}
"""Beginning of a command, and text of its output."""


def test_all_files_and_commands_of_the_guide(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    unsaid = dict(SAID)
    for kind, text in BLOCK.findall((ROOT / "docs" / "guide.md").read_text()):
        if kind != "sh":
            name = NAME.match(text)
            assert name is not None, text
            (tmp_path / name[1]).write_text(text)
            continue
        for command in text.splitlines():
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            output = done.stdout + done.stderr
            assert done.returncode == 0 and "Traceback" not in output, f"{command}\n{output}"
            for begin in [begin for begin in unsaid if f"{command}\n".startswith(begin)]:
                assert unsaid.pop(begin) in output, f"{command}\n{output}"
    assert not unsaid
    assert {"config.json", "README.md"} <= {path.name for path in (tmp_path / "adder").iterdir()}
