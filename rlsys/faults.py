"""Named fault points: places where a test lets a process fail. Off, and free, where RLSYS_FAULTS is not set.

RLSYS_FAULTS="point@key=value,key=value:action;point:action"

A point acts where all given keys agree. The keys `role` (driver, actor, learner), `number` and `attempt` (0 for the
first process of a number) are those of the process, see `identify`; a point adds its own, such as `step`. `hit=N` is
the N-th time in this process that the point is passed with the other keys in agreement; without it, every time.

Actions: kill9 and stop send SIGKILL and SIGSTOP to the own process, hang never returns, raise raises RuntimeError,
full raises OSError(ENOSPC). Any other word is the point's own and is answered to it.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import dataclass, field

from rlsys.errors import ConfigError

VARIABLE = "RLSYS_FAULTS"
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
            return _act(found.point, found.action)
    return None


def _act(point: str, action: str) -> str:
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "hang":
        threading.Event().wait()
    if action == "raise":
        raise RuntimeError(f"fault point {point}")
    if action == "full":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (fault point {point})")
    return action
