"""The deadline of values: a source that takes too long has failed for all nodes of the request."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from actors.search.requests import Value, Values
from actors.search.scheduler import Valuer
from actors.search.values.shape import shaped
from rlsys.types import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TimedValuer:
    """A source of values with a deadline of `timeout_s` seconds for each request.

    The requests to engines that are under way are cancelled. Their tokens are not counted.
    """

    source: Valuer
    timeout_s: float

    async def values(self, prompt: Prompt, request: Value, affinity: int) -> Values:
        try:
            async with asyncio.timeout(self.timeout_s) as deadline:
                return await self.source.values(prompt, request, affinity)
        except TimeoutError:
            if not deadline.expired():  # it is the source's own
                raise
            nodes = sum(len(line.texts) for line in request.lines)
            log.warning("prompt %s: %d values took longer than %g s", prompt.prompt_id, nodes, self.timeout_s)
            return Values(values=shaped(request, [None] * nodes), failed={"timeout": nodes})
