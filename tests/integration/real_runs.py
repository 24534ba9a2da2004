"""Runs of the real command line on tiny models, and what their processes and sockets looked like."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.metrics import METRICS, read_rows

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "RLSYS_TEST_MARK"  # an environment variable that every process of a run inherits
LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|::1|::ffff:127\.\d+\.\d+\.\d+")

# 60 steps on chains without side nodes teach the form of an answer, not yet counting: rewards are mixed, so
# advantages, gradients and weights of the online stage are not zero.
TINY: dict[str, Any] = {
    "run": {"seed": 3},
    "model": {
        "from_scratch": {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128, "max_positions": 128}
    },
    "task": {
        "type": "letter_count",
        "min_length": 2,
        "max_length": 4,
        "alphabet": "abc",
        "error_rate": 0,
        "shares": {"sub_task": 0, "hypothesis": 0, "double_check": 0, "reflection": 0, "reclarify": 0},
    },
    "actors": {"count": 2, "max_model_len": 128, "max_num_seqs": 64, "kv_cache_gib": 0.1},
    "sampling": {"max_tokens": 40},
    "learner": {"ranks": 2, "zero_stage": 2},
    "objective": {"kl": {"weight": 0.01}},
    "warm_start": {
        "max_steps": 60,
        "rows_per_step": 32,
        "optimizer": {"learning_rate": 5e-3, "warmup_updates": 5, "schedule": "cosine"},
    },
    "train": {
        "max_steps": 10,
        "groups_per_step": 8,
        "group_size": 4,
        "updates_per_step": 2,
        "optimizer": {"learning_rate": 3e-4, "warmup_updates": 0},
    },
    "checkpoint": {"interval": 5},
    "evaluation": {"prompts": 16, "samples": 2},
}

# Chains of the tiny warm start are thinking nodes and an answer; the fixed reflection is in words it can read.
TREES: dict[str, Any] = {
    "nodes": {
        "thinking": {"tag": "thinking"},
        "reflection": {"tag": "reflection", "prefixes": ["0 is wrong", "1 is wrong"], "writer": "nobody"},
        "answer": {"tag": "answer", "terminal": True},
    },
    "tables": {
        "tiny": {
            "children": {
                "start": {"thinking": 2},
                "thinking": {"thinking": 2, "answer": 1},
                "reflection": {"thinking": 2},
            },
            "after_wrong": {"thinking": {"reflection": 1}},
        }
    },
    "patterns": ["tiny"],
    "parallel_simulations": 4,
    "max_node_tokens": 16,
    "max_depth": 5,
    "stop": {"simulations": 16, "correct": [{"count": 8}, {"count": 3, "after": 8}]},
}
STEADY = {"learning_rate": 1e-3, "warmup_updates": 0}
WARM, SFT, PREFERENCE, TREE_COUNT, SHARD = 50, 4, 6, 24, 5
BEGINS = WARM + SFT + PREFERENCE  # the weight version that the online stage of WHOLE begins with

# All stages in one run; online, all terms but the critic's learn together.
WHOLE: dict[str, Any] = {
    **TINY,
    "stages": ["warm_start", "search", "sft", "preference", "online"],
    "warm_start": {**TINY["warm_start"], "max_steps": WARM},
    "search": {**TREES, "expansion": "chain", "prompts": TREE_COUNT, "shard_size": SHARD},
    "extract": {"supervised": "longest", "chosen": "shortest"},
    "sft": {"max_steps": SFT, "rows_per_step": 8, "optimizer": {**STEADY}},
    "preference": {"max_steps": PREFERENCE, "pairs_per_step": 8, "optimizer": {**STEADY}},
    "objective": {
        "kl": {"weight": 0.01},
        "preference": {"weight": 0.1, "label_smoothing": 0.1, "source": "file"},
        "sft": {"weight": 0.1},
        "grad_norm_interval": 2,
    },
}


@dataclass
class Seen:
    """Observations of the process tree of a run."""

    listening: set[tuple[str, int]] = field(default_factory=set)
    ray_folders: set[str] = field(default_factory=set)
    actor_children: dict[int, list[str]] = field(default_factory=dict)  # observed command lines by process
    names: set[str] = field(default_factory=set)
    verifiers: dict[int, psutil.Process] = field(default_factory=dict)  # which inherit next to nothing, by process id

    @property
    def ports(self) -> set[int]:
        return {port for _, port in self.listening}


class Command:
    """A command of rlsys in its own session. A thread watches all processes that it starts."""

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "rlsys.cli"),
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.seen = Seen()
        self._process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {}), MARK: self.mark},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self.lines: list[tuple[float, str]] = []  # output so far, each line with its time.monotonic()
        self._output: tuple[list[str], list[str]] = ([], [])
        streams = zip((self._process.stdout, self._process.stderr), self._output, strict=True)
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in streams]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def stdout(self) -> str:
        return "".join(self._output[0])

    @property
    def stderr(self) -> str:
        return "".join(self._output[1])

    def wait(self) -> int:
        """The exit code."""
        code = self._process.wait()
        self._watcher.join()
        return code

    def finish(self) -> Command:
        """Wait for success; the outputs are complete then."""
        code = self._end()
        assert code == 0, f"exit code {code}\n{self.stdout}\n{self.stderr}"
        return self

    def fail(self, code: int) -> str:
        """Wait for a failure, and return its standard error."""
        found = self._end()
        assert found == code, f"exit code {found}, expected {code}\n{self.stdout}\n{self.stderr}"
        return self.stderr

    def _end(self) -> int:
        code = self.wait()
        for reader in self._readers:
            reader.join(timeout=10)
        return code

    def said(self, text: str, after: float = 0.0) -> tuple[float, str]:
        """Return the first line with a text that came after a time, and the time of the line."""
        found = [(time, line) for time, line in self.lines if text in line and time >= after]
        assert found, f"{text!r} was not said\n{self.stdout}\n{self.stderr}"
        return found[0]

    def signal(self, number: signal.Signals, group: bool) -> None:
        """Signal the driver, or its whole group as a terminal's Ctrl-C does."""
        (os.killpg if group else os.kill)(self._process.pid, number)

    def left_over(self) -> list[str]:
        """Return the running processes of this command, its listening ports, and the existing folders of its Ray."""
        alive = [*marked(self.mark), *filter(_runs, self.seen.verifiers.values())]
        processes = [f"process {process.pid} {_command_line(process)}" for process in alive]
        for listener in psutil.net_connections("tcp"):
            listens = listener.status == psutil.CONN_LISTEN and listener.laddr.port in self.seen.ports
            if listens and not self._is_of_another(listener.pid):
                owner = ""
                with contextlib.suppress(psutil.NoSuchProcess):
                    owner = _command_line(psutil.Process(listener.pid)) if listener.pid else ""
                processes.append(f"port {listener.laddr.port} of {owner or 'a process that is gone'}")
        return processes

    def _is_of_another(self, pid: int | None) -> bool:
        """Return whether a process belongs to another command, which may use the same port.

        Agents of Ray change their title, which overwrites their environment. Their parents have the mark.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid) if pid else None
            marks = {_mark_of(each.pid) for each in (process, *process.parents())} if process else set()
            return bool(marks - {None, self.mark}) and self.mark not in marks
        return False

    def assert_gone(self, within_s: float) -> None:
        """Assert that nothing of the command is left at the latest `within_s` seconds from now."""
        deadline = time.monotonic() + within_s
        while left := self.left_over():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def kill(self) -> None:
        """Clean up after a failed test."""
        for process in [*marked(self.mark), *filter(_runs, self.seen.verifiers.values())]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _read(self, stream: IO[str], kept: list[str]) -> None:
        for line in stream:
            self.lines.append((time.monotonic(), line))
            kept.append(line)

    def _watch(self) -> None:
        while self.running:
            for process in marked(self.mark):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    self._look_at(process)
            time.sleep(0.5)

    def _look_at(self, process: psutil.Process) -> None:
        line = _command_line(process)
        self.seen.names.add(line.split(" ")[0])
        self.seen.ray_folders.update(re.findall(r"/tmp/rl-[0-9a-f]{8}", line))
        for connection in process.net_connections("inet"):
            bound = connection.status == psutil.CONN_LISTEN or not connection.raddr
            if bound and connection.laddr:
                self.seen.listening.add((connection.laddr.ip, connection.laddr.port))
        if line.startswith("ray::RolloutActor"):
            for child in process.children(recursive=True):
                if line := _command_line(child):  # an ended process without a wait() has none
                    self.seen.actor_children.setdefault(child.pid, []).append(line)
                    if "actors.verifiers.worker" in line:
                        self.seen.verifiers.setdefault(child.pid, child)


def marked(mark: str) -> Iterator[psutil.Process]:
    """Processes that inherited the mark; zombies have no environment and do not count."""
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            if _mark_of(pid) == mark:
                yield psutil.Process(pid)


def _mark_of(pid: int) -> str | None:
    """Return the mark of a process; None if it has none or is gone."""
    begin = f"{MARK}=".encode()
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((text.removeprefix(begin).decode() for text in variables if text.startswith(begin)), None)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def write_config(folder: Path, values: Mapping[str, Any]) -> str:
    """Write a config that runs in `folder`/run, and return its path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, "run": {**values["run"], "dir": str(folder / "run")}}))
    return str(path)


def wait_for_row(command: Command, run_dir: Path, stage: str, step: int) -> None:
    """Wait until metrics.jsonl holds a step."""
    while not any(row["stage"] == stage and row["step"] >= step for row in read_rows(run_dir / "metrics.jsonl")):
        assert command.running, f"the run ended early\n{command.stdout}\n{command.stderr}"
        time.sleep(0.01)


def faults_in(log: Path) -> list[dict[str, Any]]:
    """Return the faults in a file of RLSYS_FAULTS_LOG, in the order in which they acted."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda entry: entry["time"])


@contextlib.contextmanager
def row_times(run_dir: Path) -> Iterator[list[tuple[float, int]]]:
    """Yield a list of (time, version). Inside the block it grows with every new last version of metrics.jsonl."""
    found: list[tuple[float, int]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            rows = read_rows(run_dir / "metrics.jsonl")
            version = rows[-1]["weights/version"] if rows else -1
            if not found or found[-1][1] != version:
                found.append((time.monotonic(), version))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def steady_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without times, rates and sizes that depend on the machine."""
    volatile = {name for name, spec in METRICS.items() if spec.volatile}
    return [
        {name: value for name, value in row.items() if name not in volatile}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]


def last_checkpoint(run_dir: Path) -> Path:
    found = CheckpointStore(run_dir / "checkpoints", 1).latest()
    assert found is not None
    return found


def digests(run_dir: Path) -> dict[str, str]:
    """sha256 of all weights and moments of the last checkpoint, by their place without the suffix."""
    folder = last_checkpoint(run_dir)
    return {
        str(path.relative_to(folder).with_suffix("")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@contextlib.contextmanager
def commands() -> Iterator[Callable[..., Command]]:
    """A function that starts commands, which end with the block at the latest."""
    started: list[Command] = []

    def begin(*arguments: str, **options: Any) -> Command:
        started.append(Command(*arguments, **options))
        return started[-1]

    try:
        yield begin
    finally:
        for command in started:
            command.kill()


@dataclass(frozen=True)
class FinishedRun:
    """A run that reached its end. `left` has its remains 5 s later."""

    config: str
    dir: Path
    command: Command
    left: list[str]
