"""Sources of completions, as a search asks them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from actors.engine import Completion, CompletionRequest
from actors.search.requests import Call


class CompletionEngine(Protocol):
    """Source of completions: one engine in this process, or several engines of one model elsewhere."""

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        """Return a future for every request, in order.

        A future raises RolloutError if its request failed, EngineError if the engine broke.

        Args:
            affinity: Number that selects one of several engines, modulo their number. All requests of a tree have
                the same affinity, so that they share the prefix cache of one engine.
        """
        ...


def completion_request(name: str, call: Call, temperature: float, top_p: float) -> CompletionRequest:
    """Return the request of a call to an engine.

    Args:
        name: Name of the request in messages.
    """
    return CompletionRequest(
        request_id=name,
        token_ids=call.token_ids,
        seed=call.seed,
        temperature=temperature,
        top_p=top_p,
        max_tokens=call.max_tokens,
        stop_token_ids=call.stop.token_ids,
        stop_strings=call.stop.strings,
    )
