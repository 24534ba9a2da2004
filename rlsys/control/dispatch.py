"""Distribute prompts over the actors of a pool, so that callers need not name an actor.

Prompt number n goes to actor n modulo the number of actors, counted in the order that each function states.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from rlsys.interfaces import EngineStats, RolloutPool
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Float32Array, Int32Array, Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup

Rollout = TrajectoryGroup | RolloutFailure
Deliver = Callable[[int, Rollout], Awaitable[None]]


class TreePool(Protocol):
    """The actors that grow trees; see `rlsys.control.fleet.Fleet`."""

    @property
    def count(self) -> int: ...

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure: ...

    async def engine_stats(self) -> Sequence[EngineStats]:
        """Return the work of every engine since the last call of this method or of `reset_engine_stats`."""
        ...

    async def reset_engine_stats(self) -> None:
        """Start a new interval of `engine_stats`."""
        ...


async def roll_out(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    searched: Sequence[bool],
    settings: SamplingSettings,
    deliver: Deliver,
) -> None:
    """Sample or search every prompt, and deliver each result as soon as it is known.

    An actor samples its prompts in one call, so that the first batch of its engine does not depend on timing. Every
    searched prompt is a call of its own, so that no tree waits for another. The sampled prompts are dealt first, in
    order, then the searched ones: each actor gets an even share of both.

    Args:
        searched: whether each prompt is searched instead of sampled.
        deliver: takes the position of a prompt and its result.
    """
    order = sorted(range(len(prompts)), key=lambda position: searched[position])  # stable, so each kind keeps its order

    async def sample(actor: int, positions: Sequence[int]) -> None:
        results = await pool.generate(actor, [prompts[position] for position in positions], settings)
        for position, result in zip(positions, results, strict=True):
            await deliver(position, result)

    async def search(actor: int, position: int) -> None:
        await deliver(position, await pool.search(actor, prompts[position]))

    async with asyncio.TaskGroup() as calls:
        for actor in range(pool.count):
            own = order[actor :: pool.count]
            sampled = [position for position in own if not searched[position]]
            if sampled:
                calls.create_task(sample(actor, sampled))
            for position in own[len(sampled) :]:
                calls.create_task(search(actor, position))


async def sample(pool: RolloutPool, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[Rollout]:
    """Return a group or failure for every prompt, in order. An actor samples its prompts in one call."""
    count = min(pool.count, len(prompts))
    parts = await asyncio.gather(*(pool.generate(n, prompts[n :: pool.count], settings) for n in range(count)))
    return [parts[n % pool.count][n // pool.count] for n in range(len(prompts))]


async def probe(pool: RolloutPool, rows: Sequence[Int32Array]) -> list[Sequence[Float32Array]]:
    """Return the log-probabilities of given rows from every actor, `[T-1]` for each row."""
    return await asyncio.gather(*(pool.probe(actor, rows) for actor in range(pool.count)))


async def grow(
    pool: TreePool,
    prompts: Mapping[int, Prompt],
    ahead: int,
    deliver: Callable[[int, Tree | TreeFailure], None],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Grow a tree of every prompt, and deliver each tree as soon as it is finished.

    Args:
        prompts: prompts by number; the number decides the actor, so that a tree never changes its actor.
        ahead: trees that one actor holds at once.
        deliver: takes the number of a prompt and its tree. If it raises an error, no further trees are grown.
        stopped: whether no further tree may begin.
    """
    queues = [deque(n for n in prompts if n % pool.count == actor) for actor in range(pool.count)]

    async def work(actor: int, queue: deque[int]) -> None:
        while queue and not stopped():
            number = queue.popleft()
            deliver(number, await pool.grow(actor, prompts[number]))

    try:
        async with asyncio.TaskGroup() as workers:
            for actor, queue in enumerate(queues):
                for _ in range(min(ahead, len(queue))):
                    workers.create_task(work(actor, queue))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
