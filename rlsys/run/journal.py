"""The driver's record of itself for `rlsys status`: a heartbeat, the end of the command, and its messages.

heartbeat.json is written every INTERVAL_S seconds, so an old one belongs to a driver that hangs or is dead. A driver
that is killed leaves its field `end` empty. logs/driver.log has the messages of the display, with their times.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rlsys.directory import RunDirectory
from rlsys.errors import AbortedRunError, CheckpointError, DamagedFileError, InterruptedRunError, RlsysError
from rlsys.files import read_json, write_json

INTERVAL_S = 10.0


@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """The content of heartbeat.json.

    Attributes:
        started: Unix time of the start of the command, seconds.
        time: Unix time of the last heartbeat.
        end: how the command ended; "" while it runs, or if it was killed.
        actors: state, calls under way and seconds without progress of each actor and auxiliary engine.
        learner: the call of the learner under way, and its seconds; empty between two calls.
    """

    started: float
    time: float
    end: str = ""
    actors: Sequence[Mapping[str, Any]] = ()
    learner: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """Writer of the heartbeat and of the messages, as a context manager. A full disk only makes it silent."""

    def __init__(self, run_dir: Path) -> None:
        directory = RunDirectory(run_dir)
        self._path, self._log = directory.heartbeat, directory.driver_log
        self._beat = Heartbeat(started=_now(), time=_now())
        self._lock = threading.Lock()  # heartbeats come from another thread than the end

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._beat.end = _describe(error)
        self._beat.actors, self._beat.learner = (), {}
        self._write()

    def say(self, text: str) -> None:
        """Append a message to logs/driver.log."""
        moment = datetime.datetime.fromtimestamp(_now()).strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            self._log.parent.mkdir(exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{moment} {text}\n")

    def beat(self, actors: Sequence[Mapping[str, Any]], learner: Mapping[str, Any]) -> None:
        """Write a heartbeat with the present work of the processes."""
        self._beat.actors, self._beat.learner = actors, learner
        self._write()

    def _write(self) -> None:
        with self._lock, contextlib.suppress(CheckpointError):
            self._beat.time = _now()
            write_json(self._path, asdict(self._beat))


def read_heartbeat(run_dir: Path) -> Heartbeat | None:
    """Return the last heartbeat of a run; None if it has none.

    Raises:
        DamagedFileError: the file cannot be read.
    """
    path = RunDirectory(run_dir).heartbeat
    if not path.exists():
        return None
    try:
        beat = Heartbeat(**read_json(path))
        _ = beat.time - beat.started  # numbers
    except (TypeError, DamagedFileError):
        raise DamagedFileError(
            f"{path}: expected a heartbeat; remove the file, which the next command writes"
        ) from None
    return beat


def _describe(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, InterruptedRunError | AbortedRunError):
        return f"interrupted by {error.message}"
    name = "" if isinstance(error, RlsysError) else f"{type(error).__name__}: "
    return f"failed: {name}{error.message if isinstance(error, RlsysError) else error}"


def _now() -> float:
    return time.time()  # noqa: TID251 - only shown to people
