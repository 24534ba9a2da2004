"""Slots bound the staleness: a simulated loop in which rollouts finish in any order."""

from __future__ import annotations

import asyncio
import random

import pytest
from fakes import group, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.control.buffer import Buffer


def issued(buffer: Buffer, indices: range) -> None:
    for index in indices:
        buffer.reserve(index)


class Simulation:
    """Producer and learner around a buffer. Of the rollouts under way, a random one finishes next."""

    def __init__(self, groups_per_step: int, max_staleness: int, seed: int) -> None:
        self.buffer = Buffer(groups_per_step, max_staleness)
        self.random = random.Random(seed)
        self.version = 0
        self.next = 0
        self.running: list[tuple[int, int]] = []  # (index, version it was sampled with)
        self.trained: list[int] = []
        self.staleness: list[int] = []

    async def produce(self) -> None:
        while True:
            for _ in range(await self.buffer.free()):
                self.buffer.reserve(self.next)
                self.running.append((self.next, self.version))
                self.next += 1
            await self.pause()

    async def roll_out(self) -> None:
        while True:
            if self.running:
                index, version = self.running.pop(self.random.randrange(len(self.running)))
                await self.buffer.finish(index, group(prompt(str(index)), version))
            await self.pause()

    async def learn(self, steps: int) -> None:
        for _ in range(steps):
            taken = await self.buffer.take()
            self.staleness += [self.version - group.oldest_version for group in taken]
            self.trained += [int(group.prompt.prompt_id) for group in taken]
            await self.pause()  # training: rollouts go on with the old weights
            self.version += 1
            await self.pause()  # published, not yet released
            await self.buffer.release()
            assert self.buffer.in_flight() == tuple(range(len(self.trained), self.next))

    async def pause(self) -> None:
        for _ in range(self.random.randrange(1, 4)):
            await asyncio.sleep(0)

    async def run(self, steps: int) -> None:
        background = [asyncio.create_task(self.produce()), asyncio.create_task(self.roll_out())]
        await asyncio.wait_for(self.learn(steps), 5)
        for task in background:
            task.cancel()
        await asyncio.wait(background)


@settings(deadline=None, max_examples=60)
@given(
    groups_per_step=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_no_group_is_older_than_the_bound_and_all_are_trained_in_order(
    groups_per_step: int, max_staleness: int, seed: int
) -> None:
    simulation = Simulation(groups_per_step, max_staleness, seed)
    asyncio.run(simulation.run(steps=12))
    assert max(simulation.staleness) <= max_staleness
    assert simulation.trained == list(range(12 * groups_per_step))


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_the_bound_is_reached(max_staleness: int) -> None:
    # All slots are filled at version 0, so the last of them is trained at version max_staleness.
    simulation = Simulation(2, max_staleness, seed=0)
    asyncio.run(simulation.run(steps=12))
    assert max(simulation.staleness) == max_staleness


def test_staleness_0_alternates_between_sampling_and_training() -> None:
    async def scenario() -> None:
        buffer = Buffer(groups_per_step=2, max_staleness=0)
        for version in range(3):
            assert await buffer.free() == 2
            issued(buffer, range(2 * version, 2 * version + 2))
            taking = asyncio.create_task(buffer.take())
            await buffer.finish(2 * version + 1, group(prompt("b")))
            await asyncio.sleep(0)
            assert not taking.done()
            await buffer.finish(2 * version, group(prompt("a")))
            assert [group.prompt.prompt_id for group in await taking] == ["a", "b"]
            with pytest.raises(TimeoutError):  # while the learner works nothing may be sampled
                await asyncio.wait_for(buffer.free(), 0.01)
            await buffer.release()

    asyncio.run(scenario())


def test_take_waits_for_the_oldest_groups_only() -> None:
    async def scenario() -> None:
        buffer = Buffer(groups_per_step=1, max_staleness=2)
        issued(buffer, range(3))
        await buffer.finish(1, group(prompt("1")))
        await buffer.finish(2, group(prompt("2")))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(buffer.take(), 0.01)
        assert buffer.in_flight() == (0, 1, 2)  # the cancelled wait took nothing
        await buffer.finish(0, group(prompt("0")))
        assert [group.prompt.prompt_id for group in await buffer.take()] == ["0"]
        assert buffer.in_flight() == (1, 2)

    asyncio.run(scenario())


def test_a_replacement_keeps_the_place_of_the_failed_one() -> None:
    async def scenario() -> None:
        buffer = Buffer(groups_per_step=2, max_staleness=0)
        issued(buffer, range(2))
        await buffer.finish(1, group(prompt("1")))
        buffer.replace(0, 7)
        assert buffer.in_flight() == (7, 1)
        await buffer.finish(7, group(prompt("7")))
        assert [group.prompt.prompt_id for group in await buffer.take()] == ["7", "1"]

    asyncio.run(scenario())


def test_reserve_beyond_the_capacity_is_an_error() -> None:
    async def scenario() -> None:
        buffer = Buffer(groups_per_step=2, max_staleness=1)
        issued(buffer, range(4))
        with pytest.raises(RuntimeError, match="4 of 4"):
            buffer.reserve(4)

    asyncio.run(scenario())


def test_release_frees_only_what_was_taken() -> None:
    async def scenario() -> None:
        buffer = Buffer(groups_per_step=1, max_staleness=1)
        issued(buffer, range(2))
        await buffer.finish(0, group(prompt("0")))
        await buffer.finish(1, group(prompt("1")))
        await buffer.release()
        assert buffer.in_flight() == (0, 1)
        await buffer.take()
        await buffer.release()
        assert buffer.in_flight() == (1,)
        assert await buffer.free() == 1

    asyncio.run(scenario())
