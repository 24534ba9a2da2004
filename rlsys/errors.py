"""The error hierarchy. Every error survives pickling, so it can cross a Ray boundary unchanged.

A message says what was expected, what was found, and which field or file to change.
"""

from __future__ import annotations


class RlsysError(Exception):
    """Base of every error that rlsys raises on purpose. Built from one message."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(RlsysError):
    """The user's input (config, override, data file, resumed run) is not usable. Exit code 2."""


class DataError(ConfigError):
    """A data set cannot be used: missing column, no rows, too many unreadable rows."""


class RolloutError(RlsysError):
    """One prompt could not be rolled out. Counted, never fatal alone."""


class EngineError(RlsysError):
    """An actor's engine is broken; the actor must not be used again."""


class ProcessDiedError(EngineError):
    """The process of an actor or rank is no more."""


class WriterLostError(EngineError):
    """An engine of search.model or search.reviewer is broken; the actor that asked it is not."""


class LearnerLostError(EngineError):
    """A learner rank died, hangs or broke. The ranks cannot go on without it: all of them must be started again."""


class WeightSyncError(RlsysError):
    """A publish failed or could not be verified. Names actor, tensor and version."""


class NonFiniteLossError(RlsysError):
    """A loss or gradient norm is NaN or infinite; the training step was not made and nothing of it was published."""


class NonFiniteStepsError(LearnerLostError):
    """Too many training steps in a row were not finite: the learner is no longer trusted."""


class CheckpointError(RlsysError):
    """A checkpoint cannot be written or read."""


class TooManyFailuresError(RlsysError):
    """Failures that are tolerated one by one passed their limit."""


class InterruptedRunError(RlsysError):
    """The run was asked to end; its state is saved. The message begins with the signal's name, or run.time_limit."""


class AbortedRunError(RlsysError):
    """The command was ended by a signal and saved nothing. The message begins with the signal's name."""
