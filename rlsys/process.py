"""What every process of a run does at its start, and what happens to them when the driver is killed.

Run as a program this module is the reaper of `kill_with_this_process`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when the one that started it is gone (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def quiet_worker(log_file: str) -> None:
    """Send this process's stdout, stderr and logging to its own file in the run directory."""
    path = Path(log_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True)


@contextlib.contextmanager
def kill_with_this_process() -> Iterator[None]:
    """SIGKILL all present descendants as soon as this process dies inside the block.

    Ray's agents outlive a killed driver by a minute, because they try to tell it. They are programs of Ray's
    own, so they cannot call `die_with_parent`; a reaper in a session of its own waits for the end of a pipe.
    """
    known = [(process.pid, process.create_time()) for process in psutil.Process().children(recursive=True)]
    with subprocess.Popen(
        [sys.executable, "-m", "rlsys.process", json.dumps(known)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as reaper:
        try:
            yield
        finally:
            reaper.kill()


def kill_and_wait(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """SIGKILL what still runs of `processes` and wait for the end of all, at most `timeout_s`."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=timeout_s)


def _reap() -> None:
    sys.stdin.read()  # ends when the other process is gone
    for pid, created in json.loads(sys.argv[1]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 1.0:  # else the number was given to another process
                process.kill()


if __name__ == "__main__":
    _reap()
