"""Named fault points: places where a test lets a process fail. Off, and free, where RLSYS_FAULTS is not set.

RLSYS_FAULTS="point@key=value,key=value:action;point:action"

A point acts where all given keys agree. The keys `role` (driver, actor, learner), `number` and `attempt` (0 for the
first process of a number) are those of the process, see `identify`; a point adds its own, such as `step`. `hit=N` is
the N-th time in this process that the point is passed with the other keys in agreement; without it, every time.

Actions: kill9 and stop send SIGKILL and SIGSTOP to the own process, kill_driver sends SIGKILL to the driver and goes
on, hang never returns, raise raises RuntimeError, full raises OSError(ENOSPC). Any other word is the point's own and is
answered to it.

Where RLSYS_FAULTS_LOG names a file, a fault that acts first appends a line of JSON to it: `time` on CLOCK_MONOTONIC,
which all processes of a host share, point, action, the process and the point's own keys (`where`).
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
    """The faults of a value of RLSYS_FAULTS.

    Raises:
        ConfigError: an entry that is no `point:action`, so that no test passes for want of its fault.
    """
    found = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        place, colon, action = entry.partition(":")
        point, _, keys = place.partition("@")
        where = dict(key.partition("=")[::2] for key in keys.split(",")) if keys else {}
        hit = where.pop("hit", None)
        good = point and colon and action and all(where) and all(where.values())
        if not good or (hit is not None and not (hit.isdecimal() and int(hit) > 0)):
            raise ConfigError(f"{VARIABLE}: expected point@key=value,hit=number:action, found {entry!r}")
        found.append(_Fault(point, action, where, int(hit) if hit else None))
    return found


def _given() -> list[_Fault]:
    try:
        return parse(os.environ.get(VARIABLE, ""))
    except ConfigError:  # which the command line says
        return []


_faults = _given()
if _faults:
    os.environ.setdefault(DRIVER_PID, str(os.getpid()))  # the driver is the first process of a run that comes here


def identify(role: str, number: int | str, attempt: int) -> None:
    """Say which process this is. Without it: the driver."""
    _process.update(role=role, number=str(number), attempt=str(attempt))


def fault(point: str, **where: object) -> str | None:
    """Fail as the active faults of this point say, or answer with the point's own action; None where there is none."""
    if not _faults:
        return None
    here = _process | {key: str(value) for key, value in where.items()}
    for found in _faults:
        if found.point == point and found.acts(here):
            _log(point, found.action, where)
            return _act(point, found.action)
    return None


def _log(point: str, action: str, where: Mapping[str, object]) -> None:
    """Append what happens to the file of RLSYS_FAULTS_LOG, in one write, so that lines of processes do not mix."""
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
