"""What the tree search asks of whoever writes its nodes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from actors.engine import Completion, CompletionRequest


class WriterEngine(Protocol):
    """Draws completions: an engine in this process, or several of one model elsewhere."""

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        """A future for every request, in order; it raises RolloutError (this request) or EngineError (all of them).

        Args:
            affinity: which engine of several, modulo their number; a tree keeps to one for its prefix cache.
        """
        ...
