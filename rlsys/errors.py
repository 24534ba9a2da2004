"""The error hierarchy. Every error can be pickled, so it crosses a Ray boundary unchanged.

A message names the expected value, the actual value, and the field or file to change.
"""

from __future__ import annotations

import re

MAX_CAUSE = 1000  # characters of the message of an exception
PASSING = re.compile("memory|alloc|cuda|nccl|gloo|connection|socket|peer|time ?out|timed out", re.IGNORECASE)
"""Words in the messages of exceptions that may not come again: of memory, devices and connections."""


class RlsysError(Exception):
    """Base class of all errors that rlsys raises on purpose, made from one message."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(RlsysError):
    """Unusable input of the user: config, override, data file or resumed run. Exit code 2."""


class DataError(ConfigError):
    """Unusable data set: missing column, no rows, or too many unreadable rows."""


class InputError(ConfigError):
    """Input that an engine or a learner rank refuses. Another process would refuse it too, so none is restarted."""


class RolloutError(RlsysError):
    """Failed rollout of one prompt. It is counted, and never fatal alone."""


class EngineError(RlsysError):
    """Broken engine of an actor. The actor must not be used again."""


class RaisedError(EngineError):
    """Exception of a living process that computed something. The same computation would raise it again.

    The message ends with " failed: " and the exception.
    """

    @property
    def exception(self) -> str:
        """The exception, without the name of the process."""
        return self.message.partition(" failed: ")[2]


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
    text = " ".join(str(error).split())[:MAX_CAUSE]
    name = type(error).__name__
    passes = isinstance(error, OSError | MemoryError | EOFError) or PASSING.search(f"{name} {text}")
    return (EngineError if passes else RaisedError)(f"{who} failed: {name}: {text}")
