"""The error hierarchy. Every error can be pickled, so it crosses a Ray boundary unchanged.

A message names the expected value, the actual value, and the field or file to change.
"""

from __future__ import annotations

import re

MAX_CAUSE = 1000  # characters of the message of an exception
_TRANSIENT = re.compile("memory|alloc|cuda|nccl|gloo|connection|socket|peer|time ?out|timed out", re.IGNORECASE)
"""Words in the messages of exceptions that may not come again: of memory, devices and connections."""
_TRANSIENT_TYPES = re.compile(r"(OS|Memory|EOF|Connection|Timeout|BrokenPipe|FileNotFound|Permission)\w*Error")
_CERTAIN_TYPES = re.compile(r"(Index|Key|Type|Assertion|Attribute|ZeroDivision|NotImplemented)Error")
"""Types of exceptions of a program or its input, whatever words they contain."""
_DEVICE_ASSERTION = "device-side assert"  # that an index is in bounds, for example


class RlsysError(Exception):
    """Base class of all errors that rlsys raises on purpose, made from one message."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(RlsysError):
    """Unusable input of the user: config, override, data file, or files of the run to be resumed. Exit code 2."""


class DataError(ConfigError):
    """Unusable data set: missing column, no rows, or too many unreadable rows."""


class InputError(ConfigError):
    """Input that an engine or a learner rank refuses. Another process would refuse it too, so none is restarted."""


class RolloutError(RlsysError):
    """Failed rollout of one prompt. It is counted, and never fatal alone."""


class EngineError(RlsysError):
    """Broken engine of an actor. The actor must not be used again."""


class RaisedError(EngineError):
    """Exception of a computation. The same computation in another process would raise it again.

    Attributes:
        exception: the exception in one line, without the name of the process.
    """

    def __init__(self, message: str, exception: str = "") -> None:
        super().__init__(message)
        self.exception = exception or message


class ProcessDiedError(EngineError):
    """Death of the process of an actor or a learner rank."""


class AuxiliaryEngineLostError(EngineError):
    """Broken engine of search.model or search.reviewer. The actor that called it is intact."""


class LearnerLostError(EngineError):
    """Dead, hanging or broken learner rank. All ranks must be restarted, because none can continue alone."""


class LearnerRaisedError(LearnerLostError, RaisedError):
    """Learner rank that raised an exception and lives. A restart that raises it again has no use."""


class WeightSyncError(RlsysError):
    """Failed or unverified publish. The message names actor, tensor and version."""


class NonFiniteLossError(RlsysError):
    """NaN or infinite loss or gradient norm. The training step was not applied or published."""


class NonFiniteStepsError(LearnerLostError):
    """Too many consecutive training steps that were not finite. The learner is no longer trusted."""


class CheckpointError(RlsysError):
    """Checkpoint that cannot be written or read."""


class DamagedFileError(CheckpointError, ConfigError):
    """File of a run that is missing, damaged or unreadable. The same command fails again until the user acts."""


class TooManyFailuresError(RlsysError):
    """More tolerated failures than the config allows."""


class InterruptedRunError(RlsysError):
    """Requested end of a run, with its state saved. The message begins with the signal's name or run.time_limit."""


class AbortedRunError(RlsysError):
    """End of a command by a signal, with nothing saved. The message begins with the signal's name."""


def failed(who: str, error: BaseException) -> EngineError:
    """Return the error of a living process that raised an exception, in one line.

    Args:
        who: name of the process.
        error: the exception.
    """
    if isinstance(error, OSError | MemoryError | EOFError):
        return EngineError(f"{who} failed: {_line(error)}")
    return raised(f"{who} failed", _line(error))


def raised(beginning: str, exception: str) -> EngineError:
    """Return the error for an exception: a RaisedError, or an EngineError if the exception may not come again.

    Args:
        beginning: the beginning of the message.
        exception: type and text of the exception.
    """
    message, name = f"{beginning}: {exception}", exception.partition(":")[0]
    certain = _CERTAIN_TYPES.search(name) or _DEVICE_ASSERTION in exception
    transient = _TRANSIENT_TYPES.search(name) or _TRANSIENT.search(exception)
    return RaisedError(message, exception) if certain or not transient else EngineError(message)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_CAUSE]}"
