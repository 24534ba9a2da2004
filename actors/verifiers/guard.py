"""The process above a verifier: nothing that a verification starts outlives it.

What a verifier forks may leave its process group and session, and a kill of the group would miss it. Linux hands
orphans to the nearest ancestor that has asked for them (PR_SET_CHILD_SUBREAPER), here the guard, so that all of
them stay below it, where they are found and killed: on SIGTERM from the actor, when the actor is gone (the kernel then
sends SIGCONT, which a stopped guard hears too), when the verifier has ended, and when there are more of them, or larger
ones, than the limits allow.

This contains faults. It is no boundary against a program that means harm: that one can kill the guard.
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
PAUSE_S = 0.001
KILL_TIMEOUT_S = 2.0  # a process that the kernel holds longer is left to it
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def guard(work: Callable[[], None], take_leave: Callable[[], None], memory_mib: int, actor: int) -> NoReturn:
    """Fork; do `work` in the child and watch over it and all below it in this process, which ends with it.

    Args:
        take_leave: called in this process, to close what belongs to the child.
        memory_mib: what the child and all below it may hold together.
        actor: id of the process that started this one.
    """
    adopt_orphans()
    watched = {signal.SIGTERM, signal.SIGCHLD, signal.SIGCONT}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.setsid()  # a verifier that kills its own group does not meet the guard
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        die_with(parent, signal.SIGKILL)
        work()
        sys.exit(0)
    take_leave()
    _watch(child, _Family(memory_mib), watched, actor)


def die_with(parent: int, number: signal.Signals) -> None:
    """Ask the kernel for a signal when the parent ends, then check that it has not ended already."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(1)


def adopt_orphans() -> None:
    """From now on what is orphaned anywhere below this process becomes its child."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(kept: Collection[int] = ()) -> None:
    """SIGKILL everything below this process but `kept` and what is below those, and wait for the ends.

    Costs one system call where there is nothing.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while _has_children() and (found := descendants(kept)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            with contextlib.suppress(ChildProcessError):  # of another below this one: it comes here as an orphan
                os.waitpid(pid, os.WNOHANG)
        time.sleep(PAUSE_S)


def descendants(kept: Collection[int] = ()) -> set[int]:
    """Ids of the processes below this one, without `kept` and what is below those; zombies count."""
    children: dict[int | None, list[int]] = {}
    for pid in _all_ids():
        children.setdefault(_parent(pid), []).append(pid)
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        new = [pid for pid in children.get(waiting.pop(), ()) if pid not in kept]
        found.update(new)
        waiting += new
    return found


class _Family:
    """Who is below this process, kept up to date at the cost of listing /proc."""

    def __init__(self, memory_mib: int) -> None:
        self._memory_mib = memory_mib
        self._strangers: set[int] = set()
        self._members: set[int] = set()
        self._looked = -POLL_S

    def problem(self) -> str:
        """What is too much, in words; "" where nothing is, or where the last look was less than POLL_S ago."""
        if time.monotonic() - self._looked < POLL_S:
            return ""
        ids = _all_ids()
        self._strangers &= ids
        self._members &= ids
        for pid in sorted(ids - self._strangers - self._members):
            related = _parent(pid) in {os.getpid(), *self._members}
            (self._members if related else self._strangers).add(pid)
        self._looked = time.monotonic()
        if len(self._members) > MAX_PROCESSES:
            return f"the verifier and what it started are more than {MAX_PROCESSES} processes"
        # One alone has its limit from the kernel.
        if len(self._members) > 1 and sum(map(_memory_kib, self._members)) > self._memory_mib << 10:
            return f"the verifier and what it started hold more than rewards.memory_mib = {self._memory_mib}"
        return ""


def _watch(child: int, family: _Family, watched: Collection[signal.Signals], actor: int) -> NoReturn:
    while True:
        came = signal.sigtimedwait(watched, POLL_S)
        problem = family.problem()
        if problem:
            print(problem, file=sys.stderr, flush=True)
        asked = came is not None and came.si_signo == signal.SIGTERM
        if problem or asked or os.getppid() != actor:
            end_descendants()
            os._exit(1)  # at once: the actor waits, and there is nothing to tidy up
        status = _collect().get(child)
        if status is not None:
            end_descendants()
            _leave_as(os.waitstatus_to_exitcode(status))


def _collect() -> dict[int, int]:
    """Wait status of every child that has ended, by its id."""
    found: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = ended[1]
    return found


def _leave_as(code: int) -> NoReturn:
    """End as the verifier did, so that the actor can say how."""
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
    """None where the process is gone."""
    try:  # the name, in parentheses, may hold anything
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def _memory_kib(pid: int) -> int:
    """The process's share of its resident memory: pages that several hold count once among them."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1])
    return 0


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
