"""Publishes of the fleet: every actor takes the version or is lost, and late actors take it too."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import prompt
from fleet_world import SERVING, SETTINGS, STALE, Process, World, run, settle

from rlsys.errors import (
    LearnerLostError,
    WeightSyncError,
)
from rlsys.types import WeightAck, WeightOffer


def test_nobody_generates_while_a_publish_is_under_way_and_nobody_serves_mixed_versions() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            await world.publish(found, 1)
            world.processes[1].gate.clear()
            publish = asyncio.create_task(world.publish(found, 2))
            await settle()
            assert found.states() == [SERVING, STALE]
            assert await found.generate(1, [prompt("a")], SETTINGS) == [("a", 0, 0)]
            world.processes[1].gate.set()
            await publish
            assert found.states() == [SERVING, SERVING]

    run(test)


def test_an_engine_that_took_a_publish_wrongly_is_never_asked_again() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            seen: list[str] = []

            def check(ack: WeightAck) -> None:
                seen.append(ack.actor)
                if seen == ["0"]:
                    raise WeightSyncError("actor 0: log-probabilities differ")

            await world.publish(found, 1, check)
            await settle()
            assert world.processes[0].killed and seen == ["0", "1", "0"]
            assert found.states() == [SERVING, SERVING]

    run(test)


def test_weights_that_no_actor_can_take_end_the_run_with_the_first_cause() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:

            def check(ack: WeightAck) -> None:
                raise WeightSyncError(f"actor {ack.actor}: log-probabilities differ")

            with pytest.raises(WeightSyncError, match="actor 0: log-probabilities differ"):
                await world.publish(found, 1, check)

    run(test)


def test_weights_that_vanish_with_the_learner_are_the_learners_loss() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            world.processes[1].error = LearnerLostError("weight version 1 was lost")
            with pytest.raises(LearnerLostError, match="weight version 1 was lost"):
                await world.publish(found, 1)
            await found.withdraw()
            await settle()
            await world.publish(found, 1)
            assert [process.version for process in world.processes if not process.killed] == [1, 1]

    run(test)


def test_all_actors_killed_in_a_publish_come_back_and_take_it() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            for process in world.processes:
                process.gate.clear()
            publish = asyncio.create_task(world.publish(found, 1))
            await settle()
            for process in list(world.processes):
                process.kill()
            await publish
            await settle()
            assert found.states() == [SERVING, SERVING]
            assert [process.version for process in world.processes] == [None, None, 1, 1]

    run(test)


def test_an_actor_that_comes_up_during_a_publish_takes_that_one() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            await world.publish(found, 1)
            up = asyncio.Event()

            async def starting(process: Process) -> None:
                if process.attempt:
                    await up.wait()

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            await found.generate(0, [prompt("a")], SETTINGS)
            world.processes[1].gate.clear()
            publish = asyncio.create_task(world.publish(found, 2))
            await settle()
            up.set()
            await settle()
            assert found.states() == [STALE, STALE]  # up, and waits for its turn
            world.processes[1].gate.set()
            await publish
            await settle()
            assert found.states() == [SERVING, SERVING] and world.processes[2].version == 2
            assert world.calls.count(("update", 0, 1)) == 1  # never an old version first
            assert world.repeated == [2], "the other actor got the offer of the publish"

    run(test)


def test_withdrawn_weights_are_served_by_nobody_until_the_next_publish() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            await world.publish(found, 5)
            await found.withdraw()
            assert found.states() == [STALE, STALE]
            world.processes[0].kill()
            asked = asyncio.create_task(found.generate(0, [prompt("a")], SETTINGS))
            await settle()
            assert not asked.done()
            await world.publish(found, 6)
            assert (await asked)[0][0] == "a"

    run(test)


@pytest.mark.parametrize("place", ["actor", "transfer"])
def test_a_lost_learner_is_no_loss_of_actors_and_whoever_waits_for_them_hears_of_it(place: str) -> None:
    async def test(world: World) -> None:
        async with world.fleet(max_restarts=2) as found:
            await world.publish(found, 1)

            async def starting(process: Process) -> None:
                update = process.update_weights

                async def gone(*arguments: Any) -> WeightAck:
                    if world.current == 1:
                        raise LearnerLostError("weight version 1 was lost")
                    return await update(*arguments)

                process.update_weights = gone  # type: ignore[method-assign]

            async def no_offer(version: int) -> WeightOffer:
                raise LearnerLostError(f"weight version {version} was lost")

            if place == "actor":
                world.starting = starting  # type: ignore[method-assign]
            else:
                world.offer_for_late_actor = no_offer  # type: ignore[method-assign]
            world.processes[0].kill()
            assert await found.generate(0, [prompt("a")], SETTINGS) == [("a", 1, 0)]  # the other one still serves
            await settle()
            assert found.states() == [STALE, SERVING]
            world.processes[1].kill()
            with pytest.raises(LearnerLostError, match="weight version 1 was lost"):
                await found.generate(0, [prompt("b")], SETTINGS)
            await settle()
            assert len(world.processes) <= 6, "no storm of replacements"
            await found.withdraw()
            await world.publish(found, 2)  # two actors were killed, and two are allowed
            assert found.states() == [SERVING, SERVING]

    run(test)


def test_one_process_that_cannot_take_a_version_is_replaced_also_where_it_is_the_only_one() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:
            refused: list[int] = []

            def once(ack: WeightAck) -> None:
                refused.append(1)
                if len(refused) == 1:
                    raise WeightSyncError("actor 0: a bit was flipped")

            await world.publish(found, 1, once)
            assert found.states() == [SERVING] and len(refused) == 2

            def always(ack: WeightAck) -> None:
                raise WeightSyncError(f"no {len(refused)}")

            with pytest.raises(WeightSyncError, match="no 2"):
                await world.publish(found, 2, always)

    run(test)


def test_an_actor_that_is_lost_between_its_answer_and_the_check_does_not_serve() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:

            def check(ack: WeightAck) -> None:
                while not world.processes[0].killed:
                    world.now += 2
                    found.look()

            await world.publish(found, 1, check)
            assert found.states() == [SERVING]
            assert [process.version for process in world.processes] == [1, 1]
            assert await found.generate(0, [prompt("a")], SETTINGS) == [("a", 0, 1)]

    run(test)
