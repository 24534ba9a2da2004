"""Translate errors of Ray into errors of rlsys."""

from __future__ import annotations

import re

from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from rlsys import errors
from rlsys.errors import MAX_CAUSE, EngineError, ProcessDiedError, RaisedError, RlsysError, failed, raised


def translated(error: RayError, who: str) -> RlsysError:
    """Return the remote error itself if it is an RlsysError, and otherwise an EngineError in one line.

    Args:
        error: the error of a remote call.
        who: name of the process in the message.
    """
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, RlsysError):
            return error.cause
        return failed(who, error.cause)
    if isinstance(error, OutOfMemoryError):
        advice = "lower actors.kv_cache_gib, learner.micro_batch_tokens or their counts"
        return ProcessDiedError(f"{who} died: the machine ran out of memory ({advice}): {_line(str(error))}")
    if isinstance(error, NodeDiedError | WorkerCrashedError):
        return ProcessDiedError(f"{who} died: {type(error).__name__}: {_line(str(error))}")
    if isinstance(error, RayActorError):
        return death(str(error), who)
    return EngineError(f"{who} failed: {type(error).__name__}: {_line(str(error))}")


def _line(text: str) -> str:
    return " ".join(text.split())[:MAX_CAUSE]


def death(text: str, who: str) -> RlsysError:
    """Return the error of a dead actor.

    Ray reports an exception of `__init__` only as a traceback. The class of an RlsysError is restored from it.

    Args:
        text: the message of Ray.
        who: name of the process in the message.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    exception = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")
    starts = [number for number, line in enumerate(lines) if number and exception.match(line)] or [len(lines) - 1]
    cause = _line(" ".join(lines[starts[-1] :]))
    name, _, message = cause.partition(": ")
    kind = getattr(errors, name.removeprefix("rlsys.errors."), None) if name.startswith("rlsys.errors.") else None
    if isinstance(kind, type) and issubclass(kind, RaisedError):
        return kind(f"{who}: {message}", message)
    if isinstance(kind, type) and issubclass(kind, RlsysError):
        return kind(f"{who}: {message}")
    if "creation task" in text:
        return raised(f"{who} did not start", cause)
    return ProcessDiedError(f"{who} died: {cause}")
