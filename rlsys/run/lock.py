"""Lock a run directory against a second process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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


def in_use(run_dir: Path) -> bool:
    """Return whether a process of this machine uses a run directory, by the lock's record of its owner."""
    try:
        owner = json.loads(RunDirectory(run_dir).lock.read_text(encoding="utf-8"))
        return owner["host"] == socket.gethostname() and Path(f"/proc/{owner['pid']}").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False
