"""Publishes of the fleet: every actor takes the version or is lost, and late actors take it too."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import prompt
from fleet_world import SERVING, SETTINGS, STALE, Process, ScriptedPublication, World, run, settle

from rlsys.errors import (
    LearnerLostError,
    WeightSyncError,
)
from rlsys.weight_types import WeightAck


def test_a_stale_actor_gets_no_calls_so_versions_never_mix() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            await world.publish(fleet, 1)
            world.processes[1].gate.clear()
            publish = asyncio.create_task(world.publish(fleet, 2))
            await settle()
            assert fleet.states() == [SERVING, STALE]
            assert await fleet.generate(1, [prompt("a")], SETTINGS) == [("a", 0, 0)]
            world.processes[1].gate.set()
            await publish
            assert fleet.states() == [SERVING, SERVING]

    run(test)


def test_an_engine_that_fails_verification_is_never_used_again() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            seen: list[str] = []

            def check(ack: WeightAck) -> None:
                seen.append(ack.actor)
                if seen == ["0"]:
                    raise WeightSyncError("actor 0: log-probabilities differ")

            await world.publish(fleet, 1, check)
            await settle()
            assert world.processes[0].killed and seen == ["0", "1", "0"]
            assert fleet.states() == [SERVING, SERVING]

    run(test)


def test_weights_that_no_actor_can_take_end_the_run_with_the_first_cause() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:

            def check(ack: WeightAck) -> None:
                raise WeightSyncError(f"actor {ack.actor}: log-probabilities differ")

            with pytest.raises(WeightSyncError, match="actor 0: log-probabilities differ"):
                await world.publish(fleet, 1, check)

    run(test)


def test_weights_that_vanish_in_a_publish_are_a_lost_learner() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            world.processes[1].error = LearnerLostError("weight version 1 was lost")
            with pytest.raises(LearnerLostError, match="weight version 1 was lost"):
                await world.publish(fleet, 1)
            await fleet.withdraw()
            await settle()
            await world.publish(fleet, 1)
            assert [process.version for process in world.processes if not process.killed] == [1, 1]

    run(test)


def test_all_actors_killed_in_a_publish_come_back_and_take_it() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            for process in world.processes:
                process.gate.clear()
            publish = asyncio.create_task(world.publish(fleet, 1))
            await settle()
            for process in list(world.processes):
                process.kill()
            await publish
            await settle()
            assert fleet.states() == [SERVING, SERVING]
            assert [process.version for process in world.processes] == [None, None, 1, 1]

    run(test)


def test_an_actor_that_comes_up_during_a_publish_takes_that_one() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            await world.publish(fleet, 1)
            up = asyncio.Event()

            async def starting(process: Process) -> None:
                if process.attempt:
                    await up.wait()

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            await fleet.generate(0, [prompt("a")], SETTINGS)
            world.processes[1].gate.clear()
            publish = asyncio.create_task(world.publish(fleet, 2))
            await settle()
            up.set()
            await settle()
            assert fleet.states() == [STALE, STALE]  # up, and waits for its turn
            world.processes[1].gate.set()
            await publish
            await settle()
            assert fleet.states() == [SERVING, SERVING] and world.processes[2].version == 2
            assert world.calls.count(("update", 0, 1)) == 1  # never an old version first
            assert world.publications[1].members == ["1.0"], "the late actor was not up when the publish began"

    run(test)


def test_no_actor_serves_withdrawn_weights_until_the_next_publish() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            await world.publish(fleet, 5)
            await fleet.withdraw()
            assert fleet.states() == [STALE, STALE]
            world.processes[0].kill()
            asked = asyncio.create_task(fleet.generate(0, [prompt("a")], SETTINGS))
            await settle()
            assert not asked.done()
            await world.publish(fleet, 6)
            assert (await asked)[0][0] == "a"

    run(test)


def test_a_lost_learner_is_not_counted_as_lost_actors_and_ends_waiting_calls() -> None:
    async def test(world: World) -> None:
        async with world.fleet(max_restarts=2) as fleet:
            await world.publish(fleet, 1)

            async def starting(process: Process) -> None:
                update = process.update_weights

                async def gone(*arguments: Any) -> WeightAck:
                    if world.current == 1:
                        raise LearnerLostError("weight version 1 was lost")
                    return await update(*arguments)

                process.update_weights = gone  # type: ignore[method-assign]

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            assert await fleet.generate(0, [prompt("a")], SETTINGS) == [("a", 1, 0)]  # the other one still serves
            await settle()
            assert fleet.states() == [STALE, SERVING]
            world.processes[1].kill()
            with pytest.raises(LearnerLostError, match="weight version 1 was lost"):
                await fleet.generate(0, [prompt("b")], SETTINGS)
            await settle()
            assert len(world.processes) <= 6, "no storm of replacements"
            await fleet.withdraw()
            await world.publish(fleet, 2)  # two actors were killed, and two are allowed
            assert fleet.states() == [SERVING, SERVING]

    run(test)


def test_a_single_actor_that_refuses_a_version_once_is_replaced() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:
            refused: list[int] = []

            def once(ack: WeightAck) -> None:
                refused.append(1)
                if len(refused) == 1:
                    raise WeightSyncError("actor 0: a bit was flipped")

            await world.publish(fleet, 1, once)
            assert fleet.states() == [SERVING] and len(refused) == 2

            def always(ack: WeightAck) -> None:
                raise WeightSyncError(f"no {len(refused)}")

            with pytest.raises(WeightSyncError, match="no 2"):
                await world.publish(fleet, 2, always)

    run(test)


def test_an_actor_that_is_lost_between_its_answer_and_the_check_does_not_serve() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:

            def check(ack: WeightAck) -> None:
                while not world.processes[0].killed:
                    world.now += 2
                    fleet.check_progress()

            await world.publish(fleet, 1, check)
            assert fleet.states() == [SERVING]
            assert [process.version for process in world.processes] == [1, 1]
            assert await fleet.generate(0, [prompt("a")], SETTINGS) == [("a", 0, 1)]

    run(test)


def test_a_learner_lost_while_it_sends_ends_the_publish_and_loses_the_actors_that_wait_for_it() -> None:
    async def test(world: World) -> None:
        async with world.fleet(max_restarts=0) as fleet:
            for process in world.processes:
                process.gate.clear()  # as if they waited for the rest of the weights
            publication = ScriptedPublication(1, lambda ack: ack)
            publication.gate.clear()
            publish = asyncio.create_task(fleet.publish(publication))
            await settle()
            assert publication.members == ["0.0", "1.0"] and not publish.done()
            publication.error = LearnerLostError("learner rank 1 died")
            publication.gate.set()
            with pytest.raises(LearnerLostError, match="learner rank 1 died"):
                await publish
            assert [process.killed for process in world.processes[:2]] == [True, True]
            await fleet.withdraw()
            await settle()
            assert fleet.states() == [STALE, STALE], "replaced without a charge, and without weights"
            await world.publish(fleet, 1)
            assert fleet.states() == [SERVING, SERVING]

    run(test)


def test_an_actor_with_all_weights_survives_a_learner_lost_before_the_check() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            publication = ScriptedPublication(1, lambda ack: ack)
            publication.gate.clear()
            publish = asyncio.create_task(fleet.publish(publication))
            await settle()
            assert [process.version for process in world.processes] == [1, 1]
            assert fleet.states() == [STALE, STALE], "nobody has verified them"
            publication.error = LearnerLostError("learner rank 0 died")
            publication.gate.set()
            with pytest.raises(LearnerLostError, match="learner rank 0 died"):
                await publish
            assert not any(process.killed for process in world.processes)
            await world.publish(fleet, 1)
            assert fleet.states() == [SERVING, SERVING] and len(world.processes) == 2

    run(test)


def test_a_late_actor_that_never_gets_its_weights_is_lost_alone() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            await world.publish(fleet, 1)

            async def starting(process: Process) -> None:
                if process.attempt == 1:
                    process.update_weights = hang  # type: ignore[method-assign]

            async def hang(*_arguments: Any) -> WeightAck:
                await asyncio.Event().wait()
                raise AssertionError

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            await fleet.generate(0, [prompt("a")], SETTINGS)
            await settle()
            assert fleet.states() == [STALE, SERVING]
            for _ in range(8):  # the first look counts as progress
                world.now += 2
                fleet.check_progress()
                await settle()
            assert fleet.states() == [SERVING, SERVING]
            assert len(world.processes) == 4 and world.processes[3].number == 0
            assert any("actor 0 made no progress within actors.hang_timeout_s" in line for line in world.said)

    run(test)
