"""Decide when a tree asks for nothing more."""

from __future__ import annotations

from rlsys.config.search import StopConfig
from rlsys.trees import StopReason


class StopRule:
    """The limits of `search.stop` on tokens and answers, and the counts that they are compared with.

    Attributes:
        scored: distinct answers with a verdict.
        correct: distinct correct answers.
        tokens: generated tokens.
        reason: the limit that was reached first; None until then. It never changes again.
    """

    def __init__(self, config: StopConfig) -> None:
        self._config = config
        self.scored = self.correct = self.tokens = 0
        self.reason: StopReason | None = None

    def reached(self, finished_simulations: int) -> bool:
        """Return whether a limit is reached. Once true, it stays true."""
        config = self._config
        if self.reason is None:
            if any(self.correct >= rule.count and finished_simulations >= rule.after for rule in config.correct):
                self.reason = "correct"
            elif config.answers is not None and self.scored >= config.answers:
                self.reason = "answers"
            elif config.tokens is not None and self.tokens >= config.tokens:
                self.reason = "tokens"
        return self.reason is not None
