"""The parent process of a verifier, which kills everything that a verification starts.

Processes that a verifier forks may leave its process group and session, so a kill of the group would miss them. Linux
gives an orphan to its nearest ancestor with PR_SET_CHILD_SUBREAPER, here the guard. So all these processes stay below
the guard. The guard kills them in four cases:

- The actor sends SIGTERM.
- The actor has ended. The kernel then sends SIGCONT, which even a stopped process receives.
- The verifier has ended.
- The processes exceed the limit on their number or their memory.

The guard contains faults. It does not protect against a malicious program, which can kill the guard.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

MAX_PROCESSES = 32
POLL_S = 0.2
KILL_POLL_S = 0.001
KILL_TIMEOUT_S = 2.0  # a process that still lives then, in an uninterruptible system call, is left behind
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def guard(work: Callable[[], None], close_pipes: Callable[[], None], memory_mib: int, actor: int) -> NoReturn:
    """Fork, run `work` in the child, and guard the child and its descendants in this process until the child ends.

    Args:
        close_pipes: Closes this process's copies of the child's pipes.
        memory_mib: Memory limit of the child and its descendants together.
        actor: Process id of the actor, which started this process.
    """
    adopt_orphans()
    watched = {signal.SIGTERM, signal.SIGCHLD, signal.SIGCONT}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.setsid()  # a verifier that kills its own process group must not kill the guard
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        die_with(parent, signal.SIGKILL)
        work()
        sys.exit(0)
    close_pipes()
    _watch(child, _Family(memory_mib), watched, actor)


def die_with(parent: int, number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent ends. Exit if it has already ended."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(1)


def adopt_orphans() -> None:
    """Make this process the parent of all its orphaned descendants from now on."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(spared: Collection[int] = ()) -> None:
    """Kill all descendants except `spared` and their descendants, and wait until they have ended.

    Without children, this costs one system call.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while _has_children() and (pids := descendants(spared)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):  # not a direct child yet: it becomes one as an orphan
                os.waitpid(pid, os.WNOHANG)
        time.sleep(KILL_POLL_S)


def descendants(spared: Collection[int] = ()) -> set[int]:
    """Return the ids of all descendants, zombies included, except `spared` and their descendants."""
    children: dict[int | None, list[int]] = {}
    for pid in _all_ids():
        children.setdefault(_parent(pid), []).append(pid)
    pids: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        new = [pid for pid in children.get(waiting.pop(), ()) if pid not in spared]
        pids.update(new)
        waiting += new
    return pids


class _Family:
    """Number and memory of the descendants of this process, from listings of /proc."""

    def __init__(self, memory_mib: int) -> None:
        self._memory_mib = memory_mib
        self._unrelated: set[int] = set()
        self._members: set[int] = set()
        self._checked = -POLL_S

    def problem(self) -> str:
        """Return a text that names the exceeded limit; "" if there is none. Check at most every POLL_S seconds."""
        if time.monotonic() - self._checked < POLL_S:
            return ""
        ids = _all_ids()
        self._unrelated &= ids
        self._members &= ids
        for pid in sorted(ids - self._unrelated - self._members):
            related = _parent(pid) in {os.getpid(), *self._members}
            (self._members if related else self._unrelated).add(pid)
        self._checked = time.monotonic()
        if len(self._members) > MAX_PROCESSES:
            return f"the verifier and its descendants are more than {MAX_PROCESSES} processes"
        # RLIMIT_AS already limits the memory of a single process.
        if len(self._members) > 1 and sum(map(_memory_kib, self._members)) > self._memory_mib << 10:
            return f"the verifier and its descendants hold more than rewards.memory_mib = {self._memory_mib}"
        return ""


def _watch(child: int, family: _Family, watched: Collection[signal.Signals], actor: int) -> NoReturn:
    while True:
        received = signal.sigtimedwait(watched, POLL_S)
        problem = family.problem()
        if problem:
            print(problem, file=sys.stderr, flush=True)
        terminated = received is not None and received.si_signo == signal.SIGTERM
        status = _collect().get(child)
        if problem or (terminated and status is None) or os.getppid() != actor:
            end_descendants()
            os._exit(1)  # without cleanup, because the actor waits
        if status is not None:  # the code tells why, also to an actor that has lost its patience since
            end_descendants()
            _leave_as(os.waitstatus_to_exitcode(status))


def _collect() -> dict[int, int]:
    """Return the wait status of every child that has ended, by its id."""
    statuses: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[ended[0]] = ended[1]
    return statuses


def _leave_as(code: int) -> NoReturn:
    """End with the exit code or signal of the verifier, so that the actor can report it."""
    if code < 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        with contextlib.suppress(OSError):  # SIGKILL needs no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _all_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def _parent(pid: int) -> int | None:
    """Return the parent of a process; None if the process is gone."""
    try:  # the process name, in parentheses, may itself contain spaces and parentheses
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def _memory_kib(pid: int) -> int:
    """Return the proportional set size of a process, in which a shared page counts in equal parts."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1])
    return 0


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
