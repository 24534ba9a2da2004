"""Fault points: named places where a test makes a process fail. They do nothing unless RLSYS_FAULTS is set.

RLSYS_FAULTS="point@key=value,key=value:action;point:action"

A fault acts if all its keys match. The keys `role` (driver, actor, learner), `number` and `attempt` (0 for the first
process with a number) describe the process, see `identify`. A point adds further keys, such as `step`. `hit=N` selects
the N-th pass of the point in this process at which the other keys match. Without it, the fault acts at every pass.

Actions: kill9 and stop send SIGKILL and SIGSTOP to this process. kill_driver sends SIGKILL to the driver and continues.
hang never returns, raise raises RuntimeError, full raises OSError(ENOSPC). Any other word is returned to the point.

If RLSYS_FAULTS_LOG names a file, a fault appends a JSON line to it before it acts: `time` on CLOCK_MONOTONIC, which all
processes of a host share, the point, the action, the process and the keys of the point (`where`).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlsys.errors import ConfigError

VARIABLE = "RLSYS_FAULTS"
LOG = "RLSYS_FAULTS_LOG"
DRIVER_PID = "RLSYS_DRIVER_PID"  # set by the driver, inherited by the processes of its run
_process: dict[str, str] = {"role": "driver", "number": "0", "attempt": "0"}


@dataclass(slots=True)
class _Fault:
    point: str
    action: str
    where: dict[str, str]
    hit: int | None
    hits: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def acts(self, where: dict[str, str]) -> bool:
        if any(where.get(key) != value for key, value in self.where.items()):
            return False
        with self.lock:
            self.hits += 1
            return self.hit in (None, self.hits)


def parse(text: str) -> list[_Fault]:
    """Return the faults that a value of RLSYS_FAULTS describes.

    Raises:
        ConfigError: an entry is malformed. Without this check a test could pass because its fault never acts.
    """
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        place, colon, action = entry.partition(":")
        point, _, keys = place.partition("@")
        where = dict(key.partition("=")[::2] for key in keys.split(",")) if keys else {}
        hit = where.pop("hit", None)
        good = point and colon and action and all(where) and all(where.values())
        if not good or (hit is not None and not (hit.isdecimal() and int(hit) > 0)):
            raise ConfigError(f"{VARIABLE}: expected point@key=value,hit=number:action, found {entry!r}")
        faults.append(_Fault(point, action, where, int(hit) if hit else None))
    return faults


def _from_environment() -> list[_Fault]:
    try:
        return parse(os.environ.get(VARIABLE, ""))
    except ConfigError:  # the command line reports it
        return []


_faults = _from_environment()
if _faults:
    os.environ.setdefault(DRIVER_PID, str(os.getpid()))  # the driver is the first process of a run to import this


def identify(role: str, number: int | str, attempt: int) -> None:
    """Set the keys of this process. A process that never calls this counts as the driver.

    Args:
        role: actor or learner.
        number: number of the actor or rank.
        attempt: number of earlier processes with this role and number.
    """
    _process.update(role=role, number=str(number), attempt=str(attempt))


def fault(point: str, **where: object) -> str | None:
    """Carry out the first matching fault of a fault point, if there is one.

    Args:
        point: name of the fault point.
        where: keys that the point adds to those of the process.
    Returns:
        The action, if the process continues after it: the point handles words that are unknown here. None without a
        matching fault.
    """
    if not _faults:
        return None
    here = _process | {key: str(value) for key, value in where.items()}
    for candidate in _faults:
        if candidate.point == point and candidate.acts(here):
            _log(point, candidate.action, where)
            return _act(point, candidate.action)
    return None


def _log(point: str, action: str, where: Mapping[str, object]) -> None:
    """Append the fault to the file of RLSYS_FAULTS_LOG in one write, so that lines of processes do not mix."""
    if path := os.environ.get(LOG):
        entry = {"time": time.monotonic(), "point": point, "action": action, "pid": os.getpid(), **_process}
        line = json.dumps({**entry, "where": {key: str(value) for key, value in where.items()}}) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def _act(point: str, action: str) -> str:
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "kill_driver":
        os.kill(int(os.environ[DRIVER_PID]), signal.SIGKILL)
    if action == "hang":
        threading.Event().wait()
    if action == "raise":
        raise RuntimeError(f"fault point {point}")
    if action == "full":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (fault point {point})")
    return action
