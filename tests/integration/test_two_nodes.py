"""A run on two nodes computes what it computes on one, also if a node is killed in the middle and comes back."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_runs import (
    REPOSITORY,
    TINY,
    Command,
    digests,
    steady_rows,
    wait_for_row,
    write_config,
)
from reliability import begin, lost_and_twice, record

from rlsys.launch.access import TOKEN_PATH

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1800)]
CHILD = "tests/integration/nodes_child.py"


class TwoNodes:
    """A cluster of two nodes, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            "RAY_AUTH_MODE": "token",
            TOKEN_PATH: str(token),
            "RAY_TMPDIR": f"/tmp/rln-{secrets.token_hex(4)}",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        }
        Path(self.environment["RAY_TMPDIR"]).mkdir(mode=0o700)
        self._process = subprocess.Popen(
            [sys.executable, CHILD, "cluster", "2"],
            cwd=REPOSITORY,
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._answer()

    def order(self, text: str) -> None:
        assert self._process.stdin is not None
        print(text, file=self._process.stdin, flush=True)
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    found = TwoNodes(tmp_path)
    yield found
    found.close()


def settings(address: str = "local") -> dict[str, Any]:
    return {**TINY, "run": {**TINY["run"], "address": address}, "train": {**TINY["train"], "max_steps": 24}}


def processes_on(nodes: TwoNodes) -> dict[str, set[str]]:
    """Return the kinds of a run's processes by the node (the process of a raylet) that started them."""
    found: dict[str, set[str]] = {}
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or ())
        for kind in ("RolloutActor", "LearnerActor"):
            if (
                line.startswith(f"ray::{kind}")
                and (process.info["environ"] or {}).get(TOKEN_PATH) == nodes.environment[TOKEN_PATH]
            ):
                found.setdefault(str(process.ppid()), set()).add(kind)
    return found


def left_on(nodes: TwoNodes) -> int:
    """Return the number of kinds of our processes that are still on the nodes some seconds after a run."""
    deadline = time.monotonic() + 10
    while (left := sum(map(len, processes_on(nodes).values()))) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def test_two_nodes(nodes: TwoNodes, start: Callable[..., Command], tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("one", "two", "killed")}
    for folder in folders.values():
        folder.mkdir()
    start("train", write_config(folders["one"], settings())).finish()

    def begin_run(name: str) -> Command:
        config = write_config(folders[name], settings(nodes.address))
        return start("train", config, program=(CHILD, "run"), environment=nodes.environment)

    command = begin_run("two")
    wait_for_row(command, folders["two"] / "run", "online", 1)
    assert list(processes_on(nodes).values()) == [{"RolloutActor", "LearnerActor"}] * 2
    command.finish()

    row = begin(
        fault="node killed with actor and rank",
        promise="run waits for the node, goes back to the checkpoint; same bytes",
        injection="SIGKILL of a raylet",
    )
    command = begin_run("killed")
    wait_for_row(command, folders["killed"] / "run", "online", 8)
    killed = time.monotonic()
    nodes.order("kill")
    time.sleep(5)
    assert command.running
    nodes.order("start")
    command.finish()
    known, _ = command.said("is lost", after=killed)
    learner_known, _ = command.said("the learner is lost and started again", after=killed)
    recovered, _ = command.said("online ", after=learner_known)  # the first step after it
    lost, twice = lost_and_twice(folders["killed"] / "run")
    assert (lost, twice) == (0, 0)
    for name in ("two", "killed"):
        assert digests(folders[name] / "run") == digests(folders["one"] / "run")
        assert steady_rows(folders[name] / "run") == steady_rows(folders["one"] / "run")
    record(
        replace(
            row,
            passed=1,
            detection_s=known - killed,
            recovery_s=recovered - killed,
            prompts_lost=lost,
            trained_twice=twice,
            processes_left=left_on(nodes),
        )
    )
