"""Supervision of the fleet: hangs, losses, replacements and the budget of losses."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import prompt
from fleet_world import SERVING, SETTINGS, Process, World, run, settle

from actors.rollout_actor import RolloutActor
from rlsys.control.supervisor import LOSSES_WITHIN_S
from rlsys.errors import (
    ConfigError,
    EngineError,
    RaisedError,
    TooManyFailuresError,
)


def test_an_actor_without_progress_is_lost_and_a_slow_one_is_not() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as fleet:
            slow, hung = world.processes
            slow.gate.clear()
            hung.gate.clear()
            calls = [asyncio.create_task(fleet.generate(n, [prompt(f"{n}")], SETTINGS)) for n in range(2)]
            await settle()
            for _ in range(12):  # 24 seconds
                world.now += 2
                slow.steps += 1
                fleet.check_progress()
                await settle()
            assert hung.killed and not slow.killed
            assert "made no progress within actors.hang_timeout_s = 10.0 s" in world.said[0]
            slow.gate.set()
            assert [each[0][0] for each in await asyncio.gather(*calls)] == ["0", "1"]

    run(test)


def test_an_idle_actor_that_does_not_report_progress_is_lost() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:
            world.looking.clear()
            for _ in range(6):
                fleet.check_progress()
                await settle()
                world.now += 2
            fleet.check_progress()
            await settle()
            assert world.processes[0].killed and len(world.processes) == 2

    run(test)


def test_an_idle_actor_that_reports_progress_is_never_lost() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:
            for _ in range(20):
                fleet.check_progress()
                await settle()
                world.now += 2
            assert await fleet.generate(0, [prompt("a")], SETTINGS)
            assert fleet.restarts == 0

    run(test)


def test_the_start_of_an_actor_does_not_count_as_a_hang() -> None:
    async def test(world: World) -> None:
        async def starting(process: Process) -> None:
            world.now += 60

        world.starting = starting  # type: ignore[method-assign]
        async with world.fleet(count=1) as fleet:
            fleet.check_progress()
            world.processes[0].kill()
            await fleet.generate(0, [prompt("a")], SETTINGS)
            fleet.check_progress()
            await settle()
            assert fleet.restarts == 1

    run(test)


def test_the_watch_runs_by_itself() -> None:
    async def test(world: World) -> None:
        world.interval_s = 0.001
        async with world.fleet(count=1) as fleet:
            world.processes[0].killed = True  # only the watch calls it
            while fleet.restarts == 0:
                await asyncio.sleep(0.001)
            assert [(process.number, process.attempt) for process in world.processes] == [(0, 0), (0, 1)]

    run(test)


def test_more_losses_than_allowed_end_the_run_and_the_calls_that_wait() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=1) as fleet:

            async def starting(process: Process) -> None:
                process.error = EngineError(f"actor 0 died: attempt {process.attempt}") if process.attempt else None

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            with pytest.raises(TooManyFailuresError) as caught:
                await fleet.generate(0, [prompt("a")], SETTINGS)
            assert caught.value.message == (
                "2 actors were lost within an hour, more than actors.max_restarts = 1; the first: actor 0 died: "
                "killed; the last: actor 0 died: attempt 1"
            )

    run(test)


def test_a_replacement_that_cannot_start_is_one_more_loss() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:

            async def starting(process: Process) -> None:
                process.error = ConfigError("the folder cannot be read now") if process.attempt == 1 else None

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            assert await fleet.generate(0, [prompt("a")], SETTINGS) == [("a", 0, 2)]
            assert fleet.restarts == 2

    run(test)


def test_without_restarts_the_first_loss_is_the_error() -> None:
    async def test(world: World) -> None:
        async with world.fleet(max_restarts=0) as fleet:
            world.processes[1].kill()
            with pytest.raises(EngineError, match="actor 1 died: killed"):
                await fleet.generate(1, [prompt("a")], SETTINGS)

    run(test)


@pytest.mark.parametrize(
    ("error", "broken", "max_restarts"),
    [(EngineError("no memory"), {0, 1}, 4), (EngineError("no memory"), {1}, 0), (ConfigError("no memory"), {1}, 4)],
    ids=["all of them", "none is replaced", "for a reason that all have"],
)
def test_actors_that_do_not_start_at_first_end_the_run(error: Exception, broken: set[int], max_restarts: int) -> None:
    async def test(world: World) -> None:
        async def starting(process: Process) -> None:
            process.error = error if process.number in broken else None

        world.starting = starting  # type: ignore[method-assign]
        with pytest.raises(type(error), match="no memory"):
            async with world.fleet(max_restarts=max_restarts):
                pass
        assert len(world.processes) == 2 and all(process.closed for process in world.processes)

    run(test)


def test_an_actor_that_alone_does_not_start_at_first_is_replaced() -> None:
    async def test(world: World) -> None:
        async def starting(process: Process) -> None:
            process.error = EngineError("its host is gone") if (process.number, process.attempt) == (1, 0) else None

        world.starting = starting  # type: ignore[method-assign]
        async with world.fleet() as fleet:
            await settle()
            assert fleet.states() == [SERVING, SERVING] and fleet.restarts == 1
            assert await fleet.generate(1, [prompt("a")], SETTINGS) == [("a", 1, 1)]
            assert world.said == ["actor 1 is lost and replaced: its host is gone", "actor 1 serves again"]

    run(test)


def test_a_driver_that_stood_still_blames_no_actor() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=2) as fleet:
            world.processes[0].gate.clear()
            asked = asyncio.create_task(fleet.generate(0, [prompt("a")], SETTINGS))
            await settle()
            world.now += 3600
            fleet.check_progress()
            await settle()
            assert fleet.restarts == 0
            world.processes[0].gate.set()
            await asked

    run(test)


def test_auxiliary_engines_abort_the_requests_of_a_lost_actor() -> None:
    async def test(world: World) -> None:
        reviewer = world.spawn(7, 0)
        async with world.fleet(count=2, auxiliary=[("reviewer", 0, reviewer)]) as fleet:
            world.processes[-1].kill()  # actor 1
            await fleet.generate(1, [prompt("a")], SETTINGS)
            await settle()
            assert world.forgotten == [(7, "1.0")]

    run(test)


def test_a_lost_auxiliary_engine_ends_the_run_and_is_named() -> None:
    async def test(world: World) -> None:
        reviewer = world.spawn(7, 0)
        reviewer.steps = 5  # and never more
        async with world.fleet(count=1, auxiliary=[("reviewer", 0, reviewer)]) as fleet:
            for _ in range(7):
                fleet.check_progress()
                await settle()
                world.now += 2
            with pytest.raises(EngineError, match=r"^reviewer engine 0 made no progress within actors.hang_timeout_s"):
                await fleet.generate(0, [prompt("a")], SETTINGS)
            assert reviewer.killed and fleet.restarts == 0

    run(test)


def waiting_actor() -> Any:
    """Return a rollout actor whose trees all wait for the reviewer."""
    actor: Any = object.__new__(RolloutActor)
    actor.scheduler, actor.rewards, actor.loading = None, SimpleNamespace(verdicts=2), SimpleNamespace(count=0)
    actor.receiver = SimpleNamespace(answers=0)
    actor.loaded = actor.waited = 0
    actor.teacher = None
    actor.engine, actor.auxiliary = (
        SimpleNamespace(steps=3, idle=True),
        {"reviewer": SimpleNamespace(has_open_requests=True)},
    )
    return actor


@pytest.mark.parametrize("fault", ["none", "its engine hangs", "no answer is owed", "it is stopped"])
def test_an_actor_that_waits_for_an_auxiliary_engine_does_not_hang_by_itself(fault: str) -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:
            process, actor = world.processes[0], waiting_actor()
            process.progress = actor.progress  # type: ignore[method-assign]
            process.gate.clear()
            asked = asyncio.create_task(fleet.search(0, prompt("a")))
            await settle()

            async def watch() -> None:
                for _ in range(12):  # 24 seconds
                    fleet.check_progress()
                    await settle()
                    world.now += 2

            await watch()
            assert not process.killed
            if fault == "its engine hangs":
                actor.engine.idle = False
            elif fault == "no answer is owed":
                actor.auxiliary["reviewer"].has_open_requests = False
            elif fault == "it is stopped":
                process.progress = asyncio.Event().wait  # type: ignore[assignment,method-assign]
            await watch()
            assert process.killed == (fault != "none")
            process.gate.set()
            await asked

    run(test)


def test_supervision_that_breaks_ends_the_run() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:

            def broken(number: int, attempt: int) -> Process:
                raise ValueError("no such bundle")

            world.spawn = broken  # type: ignore[method-assign]
            world.processes[0].kill()
            with pytest.raises(EngineError, match="supervision of the actors failed: ValueError: no such bundle"):
                await fleet.generate(0, [prompt("a")], SETTINGS)

    run(test)


def test_a_process_that_cannot_be_killed_is_logged_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:

            def kill() -> None:
                raise RuntimeError("Ray is not there")

            first = world.processes[0]
            first.error = EngineError("actor 0: its engine broke")
            first.kill = kill  # type: ignore[method-assign]
            assert await fleet.generate(0, [prompt("a")], SETTINGS) == [("a", 0, 1)]

    run(test)
    assert "actor 0 is not used again, but could not be killed" in caplog.text
    assert "RuntimeError: Ray is not there" in caplog.text


def test_losses_are_counted_within_an_hour() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=1) as fleet:
            for _ in range(5):
                world.processes[-1].kill()
                await fleet.generate(0, [prompt("a")], SETTINGS)
                world.now += 3601
            assert fleet.restarts == 5

    run(test)


def test_replacements_that_cannot_be_configured_end_the_run() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=2) as fleet:

            async def starting(process: Process) -> None:
                raise ConfigError("model.path is gone")

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            with pytest.raises(TooManyFailuresError, match=r"3 actors .*the first: .* killed; the last: model.path is"):
                await fleet.generate(0, [prompt("a")], SETTINGS)

    run(test)


def test_replacements_that_never_start_end_the_run_however_slowly_they_fail() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=100) as fleet:

            async def starting(process: Process) -> None:
                world.now += LOSSES_WITHIN_S  # so that the losses of an hour are never two
                raise EngineError(f"attempt {process.attempt} did not start")

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            message = "5 actors in a row did not start again; the first: attempt 1 did not .*; the last: attempt 5 did"
            with pytest.raises(TooManyFailuresError, match=message):
                await fleet.generate(0, [prompt("a")], SETTINGS)

    run(test)


def test_a_start_that_raises_the_same_exception_again_is_not_repeated() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=100) as fleet:

            async def starting(process: Process) -> None:
                process.error = RaisedError(f"actor 0 did not start ({process.attempt}): KeyError: 7", "KeyError: 7")

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            with pytest.raises(TooManyFailuresError, match=r"2 actors in a row did not start again; .*\(2\): KeyError"):
                await fleet.generate(0, [prompt("a")], SETTINGS)
            assert len(world.processes) <= 4

    run(test)


def test_actors_that_do_not_start_again_end_no_run_while_another_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlsys.control.supervisor.RETRY_S", 0.001)

    async def test(world: World) -> None:
        async with world.fleet(count=4, max_restarts=4) as fleet:
            gone = {1, 2, 3}

            async def starting(process: Process) -> None:
                process.error = EngineError("its node is gone") if process.number in gone else None

            world.starting = starting  # type: ignore[method-assign]
            for number in sorted(gone):
                world.processes[number].kill()
            while min(sum(each.number == number for each in world.processes) for number in gone) < 8:
                assert await fleet.generate(1, [prompt("a")], SETTINGS) == [("a", 0, 0)]
                await asyncio.sleep(0.001)
            assert "actor 3 did not start and is tried again in 0 s: its node is gone" in world.said
            gone.clear()
            while fleet.states() != [SERVING] * 4:
                await asyncio.sleep(0.001)
            world.processes[0].kill()  # one loss more than these three, which is within the budget
            assert len(await fleet.generate(0, [prompt("a")], SETTINGS)) == 1

    run(test)


def test_a_stale_actor_is_watched_too() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as fleet:
            await world.publish(fleet, 1)
            await fleet.withdraw()
            world.looking.clear()
            for _ in range(7):
                fleet.check_progress()
                await settle()
                world.now += 2
            assert world.processes[0].killed

    run(test)
