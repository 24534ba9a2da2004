"""Values by a function of the user's own, in the verifier processes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from actors.search.requests import Value, Values
from actors.search.values.shape import shaped
from rlsys.types import Problem, Prompt, Verdict

log = logging.getLogger(__name__)


class ChainValuer(Protocol):
    """See `actors.verifiers.pool.RewardPool`."""

    async def values(self, problem: Problem, chains: Sequence[str]) -> list[Verdict]: ...


class FunctionValuer:
    """Source of values: one call for the chain up to each new node."""

    def __init__(self, pool: ChainValuer) -> None:
        self._pool = pool

    async def values(self, prompt: Prompt, request: Value, affinity: int) -> Values:
        chains = [line.chain(number) for line in request.lines for number in range(len(line.texts))]
        verdicts = await self._pool.values(prompt.problem, chains)
        failed = Counter[str]()
        for verdict in verdicts:
            if verdict.outcome not in ("ok", "wrong"):
                failed[verdict.outcome] += 1
                log.warning("prompt %s: a value failed: %s", prompt.prompt_id, verdict.detail)
        values = [verdict.reward if verdict.answered else None for verdict in verdicts]
        return Values(values=shaped(request, values), failed=failed)
