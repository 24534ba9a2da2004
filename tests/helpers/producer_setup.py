"""A producer over fakes, and what it dispatched."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fakes import SAMPLING, FakePool, NumberTask

from rlsys.config.search import SearchConfig
from rlsys.control.budgets import FailureLimit, verifier_limit
from rlsys.control.buffer import Buffer
from rlsys.control.dynamic_sampling import GroupFilter
from rlsys.control.producer import Producer
from rlsys.data.prompts import PromptBuilder, PromptStream
from rlsys.types import Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup


class Setup:
    """A producer over fakes.

    Args:
        level: names of the prompts whose groups have no learning signal.
    """

    def __init__(
        self,
        actors: int = 2,
        groups_per_step: int = 4,
        max_staleness: int = 0,
        failing: Sequence[str] = (),
        share: float = 0.5,
        failed: int = 0,
        finished: int = 0,
        fraction: float = 0.0,
        unsolved: bool = False,
        rounds: int = 0,
        level: Sequence[str] = (),
        max_verifier_failures: float = 0.1,
    ) -> None:
        self.calls: list[Any] = []
        self.pool = FakePool(actors, self.calls, failing)
        builder = PromptBuilder(NumberTask(None), lambda text: [1] * len(text), max_model_len=8, max_tokens=4)
        self.stream = PromptStream(builder, 0)
        self.buffer = Buffer(groups_per_step, max_staleness)
        self.failures = FailureLimit(
            noun="rollouts", field="train.max_failed_rollouts", share=share, failed=failed, total=failed + finished
        )
        self.asked: list[str] = []
        self.filtering = GroupFilter(
            rounds=rounds, has_signal=self._has_signal, verifications=verifier_limit(max_verifier_failures)
        )
        self.level = {f"train-{name}" for name in level}
        search = SearchConfig(fraction=fraction, unsolved=unsolved)
        self.producer = Producer(self.pool, self.stream, self.buffer, SAMPLING, self.failures, search, self.filtering)

    def _has_signal(self, group: TrajectoryGroup) -> bool:
        self.asked.append(group.prompt.prompt_id)
        return group.prompt.prompt_id not in self.level

    def delay(self, slow: int) -> None:
        """Let an actor answer later than the others."""
        generate = self.pool.generate

        async def late(
            actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
        ) -> Sequence[TrajectoryGroup | RolloutFailure]:
            for _ in range(10 if actor == slow else 0):
                await asyncio.sleep(0)
            return await generate(actor, prompts, settings)

        self.pool.generate = late  # type: ignore[method-assign]

    def during(self, scenario: Callable[[], Awaitable[object]]) -> None:
        """Run a scenario while the producer runs; an error of the producer is raised."""

        async def both() -> None:
            producing = asyncio.create_task(self.producer.run())
            waiting = asyncio.ensure_future(scenario())
            await asyncio.wait([producing, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=5)
            waiting.cancel()
            if producing.done():
                await producing
            producing.cancel()
            await asyncio.wait([producing])
            await waiting

        asyncio.run(both())


def ids(groups: Sequence[TrajectoryGroup]) -> list[str]:
    return [group.prompt.prompt_id.removeprefix("train-") for group in groups]


def dispatches(calls: list[Any]) -> list[tuple[int, list[str]]]:
    return [(actor, [name.removeprefix("train-") for name in names]) for _, actor, names in calls]
