"""`rlsys doctor`: what it prints, and a self-test that dies."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlsys.commands import doctor
from rlsys.launch.machine_checks import Check

GOOD = Check(name="ray", mark="ok", observed="2.60.0")
BAD = Check(
    name="/dev/shm", mark="failure", observed="64 MiB free", remedy="start the container with --shm-size=1g " * 3
)


def shown(checks: list[Check], monkeypatch: pytest.MonkeyPatch, *, self_test: bool = False) -> tuple[bool, str]:
    monkeypatch.setattr(doctor, "machine_checks", lambda _run_dir: checks)
    output = io.StringIO()
    healthy = doctor.run(Path("runs"), Console(file=output, width=80), self_test=self_test)
    return healthy, output.getvalue()


def test_a_failure_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy, text = shown([GOOD, BAD], monkeypatch, self_test=True)  # a machine that fails is not tested further
    lines = text.splitlines()
    assert not healthy and lines[-1].strip() == "failures: 1, warnings: 0"
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["ok", "ray", "2.60.0"]
    assert lines[2].strip().startswith("-> start the container")


def parts(program: str, monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """Run another program in place of the self-test."""
    run = subprocess.run
    command = [sys.executable, "-c", program]
    monkeypatch.setattr(subprocess, "run", lambda _command, **options: run(command, **options))
    return list(doctor.try_parts("cpu"))


@pytest.mark.heavy
def test_a_self_test_that_dies_names_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"part": "learner", "detail": "one step", "seconds": 1.0})
    program = f"print({line!r}, flush=True); print('why', file=sys.stderr, flush=True); os.kill(os.getpid(), 4)"
    learner, engine = parts(f"import os, sys; {program}", monkeypatch)
    assert (learner.mark, learner.observed) == ("ok", "one step (1.0 s)")
    assert (engine.name, engine.mark, engine.observed) == ("engine", "failure", "the test ended with code -4: why")
    assert "rlsys.launch.self_test cpu" in engine.remedy


@pytest.mark.heavy
def test_a_self_test_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SELF_TEST_S", 0.5)
    (learner,) = parts("import time; time.sleep(60)", monkeypatch)
    assert (learner.mark, learner.observed) == ("failure", "the test did not end within 0.5 s: it printed nothing")


@pytest.mark.integration
@pytest.mark.heavy
def test_the_self_test_passes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # as in the shell of a user
    checks: list[Any] = list(doctor.try_parts("cpu"))
    assert [(check.name, check.mark) for check in checks] == [(name, "ok") for name in ("learner", "engine", "publish")]
