"""The error hierarchy. Every error can be pickled, so it crosses a Ray boundary unchanged.

A message names the expected value, the actual value, and the field or file to change.
"""

from __future__ import annotations


class RlsysError(Exception):
    """Base class of all errors that rlsys raises on purpose, made from one message."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(RlsysError):
    """Unusable input of the user: config, override, data file or resumed run. Exit code 2."""


class DataError(ConfigError):
    """Unusable data set: missing column, no rows, or too many unreadable rows."""


class RolloutError(RlsysError):
    """Failed rollout of one prompt. It is counted, and never fatal alone."""


class EngineError(RlsysError):
    """Broken engine of an actor. The actor must not be used again."""


class ProcessDiedError(EngineError):
    """Death of the process of an actor or a learner rank."""


class AuxiliaryEngineLostError(EngineError):
    """Broken engine of search.model or search.reviewer. The actor that called it is intact."""


class LearnerLostError(EngineError):
    """Dead, hanging or broken learner rank. All ranks must be restarted, because none can continue alone."""


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
