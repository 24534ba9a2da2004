"""Set up the processes of a run at their start, and end them when the driver is killed.

Run as a program, this module is the reaper of `kill_with_this_process`.
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
    """Ask the Linux kernel to send SIGKILL to this process when its parent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def openmp_environment(threads: int) -> dict[str, str]:
    """Return the environment variables for the compute threads of a process.

    Threads that wait for each other sleep, unless OMP_WAIT_POLICY says otherwise. By default they spin first, and
    beside other processes they take the cores from the very threads that they wait for.
    """
    policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": policy}


def quiet_worker(log_file: str) -> None:
    """Send stdout, stderr and logging of this process to a file.

    Args:
        log_file: path in the run directory. The file is appended to.
    """
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
    """Send SIGKILL to the processes of a Ray cluster as soon as this process dies inside the block.

    Ray's agents outlive a killed driver by a minute because they try to reach it. They are not our programs, so they
    cannot call `die_with_parent`. A reaper process in a separate session waits for the end of a pipe instead.

    Args:
        folder: the temporary folder of the cluster.
    Yields:
        The reaper.
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
    """Send SIGKILL to the processes that still run, and wait until all have ended.

    Args:
        timeout_s: longest wait, seconds.
    """
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=timeout_s)


def _reap(folder: str) -> None:
    sys.stdin.read()  # returns when the other process has died
    for _ in range(REAPING_ROUNDS):  # a process may be about to start another
        for process in processes_of_ray(folder):
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(REAPING_PAUSE_S)


def processes_of_ray(folder: str) -> list[psutil.Process]:
    """Return the processes of the Ray cluster with this temporary folder.

    Children of Ray's processes outlive their parents, so the search covers all processes of the machine.
    """
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and _is_ray_of(folder, process):
                processes.append(process)
    return processes


def _is_ray_of(folder: str, process: psutil.Process) -> bool:
    """Return whether the process belongs to Ray and uses the folder, by its command line or open files."""
    line = " ".join(process.cmdline())
    if not (line.startswith("ray::") or "/ray/" in line):  # excludes a pager that shows a log
        return False
    return folder in line or any(file.path.startswith(folder) for file in process.open_files())


if __name__ == "__main__":
    _reap(sys.argv[1])
