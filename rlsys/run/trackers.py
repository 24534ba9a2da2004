"""Start the processes that send metrics to experiment trackers, and end them with the run."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlsys.errors import ConfigError
from rlsys.run.tracker import FINISH_S

_END_S = FINISH_S + 5.0


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a tracker is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin: a plain folder, such as W&B's own in this place
            raise ConfigError(
                f"run.trackers: the package {name} is not installed; pip install {name}, or remove it from run.trackers"
            )


@contextlib.contextmanager
def following(run_dir: Path, names: Sequence[str], say: Callable[[str], None]) -> Iterator[None]:
    """Let trackers follow a run inside the block. Whatever happens to them, the run goes on.

    Args:
        names: the trackers.
        say: takes the messages of the trackers.
    """
    processes = []
    for name in names:
        try:
            processes.append((name, _start(name, run_dir)))
        except OSError as error:
            say(f"tracker {name}: it cannot be started, the run goes on: {error}")
    readers = [threading.Thread(target=_hand_on, args=(process, name, say), daemon=True) for name, process in processes]
    for reader in readers:
        reader.start()
    try:
        yield
    finally:
        for _, process in processes:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        for name, process in processes:
            _await_end(name, process, say)
        for reader in readers:
            reader.join(1.0)  # the last messages


def _start(name: str, run_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "rlsys.run.tracker", name, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,  # Ctrl-C reaches the driver alone
    )


def _hand_on(process: subprocess.Popen[str], name: str, say: Callable[[str], None]) -> None:
    for line in process.stdout or ():
        say(f"tracker {name}: {line.rstrip()}")


def _await_end(name: str, process: subprocess.Popen[str], say: Callable[[str], None]) -> None:
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        say(f"tracker {name}: it was still sending {_END_S:.0f} s after the end and was stopped; metrics.jsonl has all")
