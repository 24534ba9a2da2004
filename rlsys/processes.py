"""What every process of a run does at its start, and what happens to them when the driver is killed.

Run as a program this module is the reaper of `kill_with_this_process`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
REAPING_ROUNDS, REAPING_PAUSE_S = 5, 0.5


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
def kill_with_this_process(folder: Path) -> Iterator[psutil.Process]:
    """SIGKILL Ray's processes that belong to its folder `folder` as soon as this process dies inside the block.

    Ray's agents outlive a killed driver by a minute, because they try to tell it. They are programs of Ray's
    own, so they cannot call `die_with_parent`; a reaper in a session of its own waits for the end of a pipe.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "rlsys.processes", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as reaper:
        try:
            yield psutil.Process(reaper.pid)
        finally:
            reaper.kill()


def kill_and_wait(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """SIGKILL what still runs of `processes` and wait for the end of all, at most `timeout_s`."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=timeout_s)


def _reap(folder: str) -> None:
    sys.stdin.read()  # ends when the other process is gone
    for _ in range(REAPING_ROUNDS):  # a process may be just about to start another
        for process in processes_of_ray(folder):
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(REAPING_PAUSE_S)


def processes_of_ray(folder: str) -> list[psutil.Process]:
    """Ray's processes that belong to its folder, whoever started them: what one has started outlives it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and _is_ray_of(folder, process):
                found.append(process)
    return found


def _is_ray_of(folder: str, process: psutil.Process) -> bool:
    """Ray's programs name the folder in their command line, or hide that and have a log open there."""
    line = " ".join(process.cmdline())
    if not (line.startswith("ray::") or "/ray/" in line):  # not the pager someone reads a log with
        return False
    return folder in line or any(file.path.startswith(folder) for file in process.open_files())


if __name__ == "__main__":
    _reap(sys.argv[1])
