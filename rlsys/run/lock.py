"""Lock a run directory against a second process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlsys.directory import RunDirectory
from rlsys.errors import ConfigError


class RunLock:
    """Exclusive use of a run directory, as a context manager.

    The kernel releases the lock when the process ends, for any reason. The file holds the owner's pid, host and uuid
    for the error message of a second process.

    Raises:
        ConfigError: on entering: another process holds the lock, or `run.dir` cannot be used.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = RunDirectory(run_dir).lock
        self.owner = {"pid": os.getpid(), "host": socket.gethostname(), "uuid": uuid.uuid4().hex}
        self._descriptor = -1

    def __enter__(self) -> RunLock:
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.dir: {folder} cannot be created ({error.strerror}); choose another run.dir"
            ) from error
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(self.owner).encode(), 0)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConfigError(
                f"run.dir: {self.path.parent} is in use by {self._describe_owner()}; "
                f"stop that run or choose another run.dir"
            ) from None
        except OSError as error:
            raise ConfigError(f"run.dir: {self.path} cannot be locked: {error}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _describe_owner(self) -> str:
        for _ in range(50):  # the owner may have locked the file and not yet written to it
            try:
                owner = json.loads(self.path.read_text(encoding="utf-8"))
                return f"process {owner['pid']} on {owner['host']}"
            except (OSError, ValueError, KeyError, TypeError):
                time.sleep(0.02)
        return "another process"


@dataclass(frozen=True, slots=True, kw_only=True)
class LockOwner:
    """The process that a lock file names.

    Attributes:
        here: whether it is a process of this machine.
        alive: whether it still lives; of a process elsewhere nothing is known, and it counts as dead.
    """

    pid: int
    host: str
    here: bool
    alive: bool


def read_owner(run_dir: Path) -> LockOwner | None:
    """Return the owner of the lock of a run directory; None after an orderly end, which empties the file."""
    lock = RunDirectory(run_dir).lock
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        pid, host = int(owner["pid"]), str(owner["host"])
        here = host == socket.gethostname()
        return LockOwner(pid=pid, host=host, here=here, alive=here and _is_alive(pid, lock.stat().st_mtime))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def in_use(run_dir: Path) -> bool:
    """Return whether a process of this machine uses a run directory, by the lock's record of its owner."""
    owner = read_owner(run_dir)
    return owner is not None and owner.alive


def may_be_in_use(run_dir: Path) -> bool:
    """Return whether a process uses a run directory, or may do so on another machine."""
    owner = read_owner(run_dir)
    return owner is not None and (owner.alive or not owner.here)


def _is_alive(pid: int, locked: float) -> bool:
    """Return whether a process lives that began before the lock was taken; later ones have got its number again."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < locked + 5
    except (psutil.Error, OverflowError):
        return False
