"""Calls of the fleet: which actor answers, and what happens to the calls of a lost actor."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from fakes import prompt
from fleet_world import SERVING, SETTINGS, STALE, Process, ScriptedPublication, World, run, settle

from rlsys.errors import (
    AuxiliaryEngineLostError,
    EngineError,
    InputError,
    RaisedError,
    RlsysError,
    TooManyFailuresError,
    WeightSyncError,
)
from rlsys.types import Demonstration
from rlsys.weight_types import WeightAck


def test_engine_stats_name_the_engine_and_leave_out_lost_actors() -> None:
    async def test(world: World) -> None:
        reviewer = world.spawn(7, 0)
        async with world.fleet(role="model", auxiliary=[("reviewer", 0, reviewer)]) as fleet:
            figures = await fleet.engine_stats()
            assert [(u.model, u.engine, u.generated_tokens) for u in figures] == [
                ("model", 0, 0),
                ("model", 1, 1),
                ("reviewer", 0, 7),
            ]
            assert (figures[0].busy_s, figures[0].wall_s, figures[0].in_flight_mean) == (1.0, 4.0, 2.5)
            world.processes[1].kill()
            assert [(u.model, u.engine) for u in await fleet.engine_stats()] == [("model", 1), ("reviewer", 0)]
            await settle()
            assert [u.generated_tokens for u in await fleet.engine_stats()] == [10, 1, 7]
        assert reviewer.closed

    run(test)


def test_engine_stats_have_the_actors_whose_weights_are_being_replaced() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            await world.publish(fleet, 1)
            world.processes[0].gate.clear()
            publish = asyncio.create_task(world.publish(fleet, 2))
            await settle()
            assert fleet.states() == [STALE, SERVING]
            figures = asyncio.create_task(fleet.engine_stats())
            await settle()
            world.processes[0].gate.set()
            assert [u.engine for u in await figures] == [0, 1]
            await publish

    run(test)


def test_auxiliary_engines_are_started_with_the_actors() -> None:
    async def test(world: World) -> None:
        reviewer = world.spawn(7, 0)
        reviewer.error = EngineError("reviewer engine 0 died: no memory")
        with pytest.raises(EngineError, match="^reviewer engine 0 died"):
            async with world.fleet(count=1, auxiliary=[("reviewer", 0, reviewer)]):
                pass
        assert all(process.closed for process in world.processes)

    run(test)


def test_a_call_goes_to_the_actor_it_names() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            assert fleet.states() == [SERVING, SERVING]
            assert await fleet.generate(1, [prompt("a")], SETTINGS) == [("a", 1, 0)]
            assert await fleet.search(0, prompt("b")) == ("b", 0, 0)
        assert all(process.closed for process in world.processes)

    run(test)


def test_another_actor_takes_the_calls_of_a_lost_one_which_returns_with_the_current_weights() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            await world.publish(fleet, 3)
            first = world.processes[0]
            first.gate.clear()
            asked = asyncio.create_task(fleet.generate(0, [prompt("a")], SETTINGS))
            await settle()
            first.kill()  # as the kernel would, not the fleet
            assert await asked == [("a", 1, 0)]
            await settle()
            assert fleet.states() == [SERVING, SERVING] and fleet.restarts == 1
            again = world.processes[2]
            assert (again.number, again.attempt, again.version) == (0, 1, 3)
            assert await fleet.generate(0, [prompt("b")], SETTINGS) == [("b", 0, 1)]
            assert world.said == ["actor 0 is lost and replaced: actor 0 died: killed", "actor 0 serves again"]

    run(test)


def test_without_a_serving_actor_calls_wait_for_a_replacement() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:
            await world.publish(fleet, 1)
            world.processes[0].kill()
            assert await fleet.generate(0, [prompt("a")], SETTINGS) == [("a", 0, 1)]
            assert world.processes[1].version == 1

    run(test)


def test_other_errors_are_no_loss() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            for error in (RlsysError("no module"), AuxiliaryEngineLostError("reviewer engine 0 died")):
                world.processes[0].error = error
                with pytest.raises(type(error), match=error.message):
                    await fleet.generate(0, [prompt("a")], SETTINGS)
                assert fleet.states() == [SERVING, SERVING]

    run(test)


@pytest.mark.parametrize("seed", range(30))
def test_a_storm(seed: int) -> None:
    """Kills, publishes and calls in random order: every call is answered once, with the weights of its time."""

    async def test(world: World) -> None:
        draw = random.Random(seed)
        answered: list[str] = []
        async with world.fleet(count=3, max_restarts=1000) as fleet:

            async def ask(name: str) -> None:
                [(back, _, _)] = await fleet.generate(draw.randrange(3), [prompt(name)], SETTINGS)
                answered.append(back)

            for step in range(12):
                await world.publish(fleet, step)
                calls = [asyncio.create_task(ask(f"{step}-{n}")) for n in range(8)]
                for _ in range(draw.randrange(6)):
                    for _ in range(draw.randrange(20)):
                        await asyncio.sleep(0)
                    # One that is killed in its start is tried again after a minute.
                    if up := [process for process in world.processes if process.started and not process.killed]:
                        draw.choice(up).kill()
                await asyncio.gather(*calls)
            fleet.check_progress()  # those that were killed with nothing to do are fleet out
            await settle()
            assert fleet.states() == [SERVING] * 3
            assert len(world.processes) == 3 + fleet.restarts
        assert sorted(answered) == sorted(f"{step}-{n}" for step in range(12) for n in range(8))
        assert [p.closed for p in world.processes if not p.killed] == [True] * 3

    run(test)


def test_a_call_answered_with_weights_that_fail_verification_is_repeated() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            await world.publish(fleet, 1)
            world.processes[0].gate.clear()
            world.current = None  # what is under way goes on with the new weights
            asked = asyncio.create_task(fleet.generate(0, [prompt("a")], SETTINGS))
            await settle()

            def check(ack: WeightAck) -> None:
                if ack.actor == "0":
                    raise WeightSyncError("actor 0: log-probabilities differ")

            publish = asyncio.create_task(fleet.publish(ScriptedPublication(2, lambda ack: late(ack))))
            judged = asyncio.Event()

            def late(ack: WeightAck) -> None:
                assert judged.is_set() or ack.actor == "1"
                check(ack)

            process = world.processes[0]
            update = process.update_weights

            async def slow(*arguments: Any) -> WeightAck:
                ack = await update(*arguments)
                await judged.wait()
                return ack

            process.update_weights = slow  # type: ignore[method-assign]
            process.gate.set()
            await settle()
            assert not asked.done(), "loaded, and not verified yet"
            judged.set()
            [(name, number, attempt)] = await asked
            assert (name, (number, attempt) != (0, 0)) == ("a", True)
            await publish

    run(test)


def test_a_call_that_breaks_every_actor_ends_the_run_and_names_its_prompts() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=2, max_restarts=100) as fleet:

            async def starting(process: Process) -> None:
                process.generate = broken  # type: ignore[method-assign]

            async def broken(*_arguments: Any) -> Any:
                raise EngineError("KeyError: 7")

            world.starting = starting  # type: ignore[method-assign]
            for process in world.processes:
                process.generate = broken  # type: ignore[method-assign]
            with pytest.raises(
                TooManyFailuresError, match=r"prompts bad: 5 actors were lost during this call; the first: KeyError: 7"
            ):
                await fleet.generate(0, [prompt("bad")], SETTINGS)

    run(test)


@pytest.mark.parametrize(
    ("errors", "kind", "message", "lost"),
    [
        # Two processes raised the same exception: a third one would raise it too.
        (
            [RaisedError("actor {} failed: KeyError: 7", "KeyError: 7")] * 9,
            TooManyFailuresError,
            "2 actors .*KeyError: 7",
            2,
        ),
        (
            [
                RaisedError("actor 0 failed: KeyError: 7", "KeyError: 7"),
                RaisedError("actor 1 failed: KeyError: 8", "KeyError: 8"),
            ],
            None,
            "",
            2,
        ),
        ([EngineError("actor 0 died"), EngineError("actor 0 died")], None, "", 2),
        ([InputError("the engine refuses temperature 3")], InputError, "^the engine refuses temperature 3$", 0),
    ],
    ids=["the same exception", "different exceptions", "deaths", "input"],
)
def test_a_call_that_fails_for_certain_is_not_repeated(
    errors: list[RlsysError], kind: type[RlsysError] | None, message: str, lost: int
) -> None:
    waiting = list(errors)

    async def test(world: World) -> None:
        async with world.fleet(count=2, max_restarts=100) as fleet:

            async def starting(process: Process) -> None:
                whole = process.generate

                async def generate(*arguments: Any) -> Any:
                    if not waiting:
                        return await whole(*arguments)
                    error = waiting.pop(0)
                    raise type(error)(
                        error.message.format(process.number),
                        *([error.exception] if isinstance(error, RaisedError) else []),
                    )

                process.generate = generate  # type: ignore[method-assign]

            world.starting = starting  # type: ignore[method-assign]
            for process in world.processes:
                await starting(process)
            if kind is None:
                assert await fleet.generate(0, [prompt("a")], SETTINGS)
            else:
                with pytest.raises(kind, match=message):
                    await fleet.generate(0, [prompt("a")], SETTINGS)
            assert fleet.restarts == lost

    run(test)


def test_nothing_is_started_while_the_fleet_closes() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:
            asked = asyncio.create_task(fleet.generate(0, [prompt("a")], SETTINGS))
            world.processes[0].gate.clear()
            await settle()
        world.processes[0].kill()
        await asyncio.wait({asked}, timeout=0.2)
        asked.cancel()
        assert len(world.processes) == 1

    run(test)


def demonstration(length: int) -> Demonstration:
    return Demonstration(token_ids=np.arange(length, dtype=np.int32), loss_mask=np.arange(length) != 1)


def test_the_engines_of_a_teacher_take_rows_in_turn() -> None:
    async def test(world: World) -> None:
        teachers = [world.spawn(number, 0) for number in (7, 8)]
        auxiliary = [("reviewer", 0, world.spawn(6, 0)), *(("teacher", n, each) for n, each in enumerate(teachers))]
        async with world.fleet(auxiliary=auxiliary) as fleet:
            rows = [demonstration(length) for length in (3, 4, 2)]
            found = await fleet.score_rows(rows, 2)
        for row, each, engine in zip(rows, found, (7, 8, 7), strict=True):
            assert each.teacher is not None and np.array_equal(each.token_ids, row.token_ids)
            assert each.teacher.mask.tolist() == [False, False, *row.loss_mask[2:]]
            assert each.teacher.ids.tolist() == [[0, 0], *[[engine] * 2] * (len(row.token_ids) - 1)]
            assert each.teacher.logprobs[1:].tolist() == [[-1.0] * 2] * (len(row.token_ids) - 1)

    run(test)


def test_the_loss_of_a_teacher_ends_the_scoring_of_rows() -> None:
    async def test(world: World) -> None:
        teacher = world.spawn(7, 0)
        async with world.fleet(auxiliary=[("teacher", 0, teacher)]) as fleet:
            teacher.error = EngineError("teacher engine 0 died: no memory")
            with pytest.raises(EngineError, match="teacher engine 0 died"):
                await fleet.score_rows([demonstration(3)], None)

    run(test)
