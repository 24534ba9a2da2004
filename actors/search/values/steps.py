"""Values by the task's own check of steps."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from actors.search.requests import Thoughts, Value, Values
from actors.verifiers.steps import wrong_node
from rlsys.types import Prompt, Verdict

log = logging.getLogger(__name__)


class StepChecker(Protocol):
    """See `actors.verifiers.pool.RewardPool`."""

    async def check_steps(self, items: Sequence[tuple[str, str]]) -> list[Verdict]: ...


class StepValuer:
    """Source of values: 1 for a right node, 0 for the first wrong one.

    There are none for a conversation of several messages, because tasks have rules for single questions.
    """

    def __init__(self, checker: StepChecker) -> None:
        self._checker = checker

    async def values(self, prompt: Prompt, request: Value, affinity: int) -> Values:
        if not isinstance(prompt.question, str):
            return Values(values=tuple((None,) * len(line.texts) for line in request.lines))
        items = [(prompt.question, line.chain(len(line.texts))) for line in request.lines]
        verdicts = await self._checker.check_steps(items)
        failed = Counter[str]()
        for line, verdict in zip(request.lines, verdicts, strict=True):
            if verdict.outcome not in ("ok", "wrong"):
                failed[verdict.outcome] += len(line.texts)
                log.warning("prompt %s: a check of steps failed: %s", prompt.prompt_id, verdict.detail)
        values = tuple(_step_values(*pair) for pair in zip(request.lines, verdicts, strict=True))
        return Values(values=values, failed=failed)


def _step_values(line: Thoughts, verdict: Verdict) -> tuple[float | None, ...]:
    """Return 1 for the new nodes before the wrong one, 0 for this one, and None for those behind it.

    If the wrong node stands before the new ones, they did not take it back, and the first of them is wrong.
    """
    if verdict.outcome not in ("ok", "wrong") or not verdict.answered:
        return (None,) * len(line.texts)
    wrong = wrong_node(verdict)
    if wrong is None:
        return (1.0,) * len(line.texts)
    right = min(max(0, wrong - len(line.before)), len(line.texts) - 1)
    return (*(1.0,) * right, 0.0, *(None,) * (len(line.texts) - right - 1))
