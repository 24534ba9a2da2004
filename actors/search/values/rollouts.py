"""Values by rollouts: the mean reward of chains that the proposing model draws from a node.

Source: Math-Shepherd, arXiv:2312.08935, soft estimation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.engine import Completion
from actors.search.engines import CompletionEngine, completion_request
from actors.search.requests import PlannedCall, Value, Values
from actors.search.values.shape import raise_first, shaped
from rlsys.errors import RolloutError
from rlsys.search.codec import TagCodec
from rlsys.types import WHOLE, Problem, Prompt, Verdict

log = logging.getLogger(__name__)


class Verifier(Protocol):
    """See `actors.verifiers.pool.RewardPool`."""

    async def verify(self, items: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutValuer:
    """Source of values. A node fails if the engine or the verifier has failed in all its rollouts.

    Attributes:
        codec: Codec of the proposing model.
    """

    engine: CompletionEngine
    verifier: Verifier
    codec: TagCodec
    temperature: float
    top_p: float

    async def values(self, prompt: Prompt, request: Value, affinity: int) -> Values:
        nodes = [(line.chain(n), line.rollouts[n]) for line in request.lines for n in range(len(line.texts))]
        planned = [(number, each) for number, (_, calls) in enumerate(nodes) for each in calls]
        name = f"{prompt.prompt_id}/{request.number}"
        futures = self.engine.submit(
            [
                completion_request(f"{name}.{n}", each.call, self.temperature, self.top_p)
                for n, (_, each) in enumerate(planned)
            ],
            affinity,
        )
        outcomes = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        raise_first(outcomes, RolloutError)
        drawn = [(*pair, each) for pair, each in zip(planned, outcomes, strict=True) if isinstance(each, Completion)]
        items = [
            (prompt.problem, nodes[number][0] + self._rest(call, each), each.finish_reason in WHOLE)
            for number, call, each in drawn
        ]
        verdicts = await self.verifier.verify(items)
        rewards: list[list[float]] = [[] for _ in nodes]
        for (number, _, _), verdict in zip(drawn, verdicts, strict=True):
            if verdict.outcome in ("ok", "wrong"):
                rewards[number].append(verdict.reward)
        values = [sum(each) / len(each) if each else None for each in rewards]
        failed = sum(bool(calls) and not each for (_, calls), each in zip(nodes, rewards, strict=True))
        if failed:
            log.warning("prompt %s: all rollouts of %d nodes failed", prompt.prompt_id, failed)
        tokens = sum(len(each.token_ids) for _, _, each in drawn)
        return Values(values=shaped(request, values), failed={"error": failed} if failed else {}, tokens=tokens)

    def _rest(self, planned: PlannedCall, completion: Completion) -> str:
        """Return the text of a rollout behind its node."""
        readings = self.codec.read(planned.spill, completion.token_ids, completion.finish_reason)
        return "".join(reading.text for reading in readings)
