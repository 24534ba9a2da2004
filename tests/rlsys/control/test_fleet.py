"""The supervised fleet: states, re-issued calls, replacements, publishes. Processes are scripted fakes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import prompt

from actors.rollout_actor import RolloutActor
from rlsys.control.actor_slots import ActorState
from rlsys.control.fleet import Fleet
from rlsys.control.supervisor import LOSSES_WITHIN_S
from rlsys.control.watchdog import WatchClock
from rlsys.errors import (
    AuxiliaryEngineLostError,
    ConfigError,
    EngineError,
    LearnerLostError,
    RlsysError,
    TooManyFailuresError,
    WeightSyncError,
)
from rlsys.interfaces import EngineStats
from rlsys.types import SamplingSettings, WeightAck, WeightManifest, WeightOffer

SETTINGS = SamplingSettings(samples=1, temperature=1.0, top_p=1.0, max_tokens=4, seed=0)
SERVING, STALE = ActorState.SERVING, ActorState.STALE


def offer(version: int) -> WeightOffer:
    return WeightOffer(manifest=WeightManifest(version=version, buckets=()), payload=None)


class Process:
    """An actor process whose calls a test lets go on, fail or hang."""

    def __init__(self, world: World, number: int, attempt: int) -> None:
        self.world, self.number, self.attempt = world, number, attempt
        self.version: int | None = None
        self.steps = 0
        self.killed = self.closed = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def _work(self, what: str) -> None:
        self.world.calls.append((what, self.number, self.attempt))
        await self.gate.wait()
        if self.killed:
            raise EngineError(f"actor {self.number} died: killed")
        if self.error:
            raise self.error
        self.steps += 1

    async def start(self) -> None:
        await self.world.starting(self)
        await self._work("start")

    async def generate(self, prompts: Sequence[Any], settings: SamplingSettings) -> Any:
        await self._work("generate")
        if self.world.current is not None:
            assert self.version == self.world.current  # nobody generates with other weights
        return [(each.prompt_id, self.number, self.attempt) for each in prompts]

    async def search(self, each: Any) -> Any:
        return (await self.generate([each], SETTINGS))[0]

    grow = search

    async def probe(self, rows: Sequence[Any]) -> Any:
        await self._work("probe")
        return rows

    async def update_weights(self, offer: WeightOffer, probe: Any) -> WeightAck:
        await self._work("update")
        self.version = offer.manifest.version
        return WeightAck(actor=f"{self.number}", version=self.version, probe_logprobs=())

    async def engine_stats(self) -> EngineStats:
        await self._work("engine_stats")
        return EngineStats(busy_s=1.0, wall_s=4.0, in_flight_mean=2.5, generated_tokens=10 * self.attempt + self.number)

    async def progress(self) -> int:
        await self.world.looking.wait()
        if self.killed:
            raise EngineError(f"actor {self.number} died: killed")
        return self.steps

    async def close(self) -> None:
        self.closed = True

    def kill(self) -> None:
        self.killed = True
        self.gate.set()


class World:
    """All processes that were ever started, and the calls made to them."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.calls: list[tuple[str, int, int]] = []
        self.said: list[str] = []
        self.repeated: list[int] = []  # versions that were offered to late actors
        self.current: int | None = None
        self.now = 0.0
        self.interval_s = 1.0
        self.looking = asyncio.Event()
        self.looking.set()

    async def starting(self, process: Process) -> None: ...

    def spawn(self, number: int, attempt: int) -> Process:
        self.processes.append(Process(self, number, attempt))
        return self.processes[-1]

    def fleet(
        self, count: int = 2, max_restarts: int = 4, auxiliary: Sequence[Any] = (), role: Any = "policy"
    ) -> Fleet:
        return Fleet(
            lambda number, attempt: self.spawn(number, attempt),
            count,
            max_restarts=max_restarts,
            hang_timeout_s=10.0,
            role=role,
            auxiliary=auxiliary,
            say=self.said.append,
            clock=WatchClock(monotonic=lambda: self.now, interval_s=self.interval_s),
        )

    async def offer_for_late_actor(self, version: int) -> WeightOffer:
        self.repeated.append(version)
        return offer(version)

    async def publish(self, found: Fleet, version: int, check: Callable[[WeightAck], object] = lambda ack: ack) -> None:
        self.current = version
        await found.publish(self, offer(version), (), check)


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(World()), 20)

    asyncio.run(main())


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_usage_tells_whose_it_is_and_leaves_out_who_is_not_there() -> None:
    async def test(world: World) -> None:
        reviewer = world.spawn(7, 0)
        async with world.fleet(role="model", auxiliary=[("reviewer", 0, reviewer)]) as found:
            figures = await found.engine_stats()
            assert [(u.model, u.engine, u.generated_tokens) for u in figures] == [
                ("model", 0, 0),
                ("model", 1, 1),
                ("reviewer", 0, 7),
            ]
            assert (figures[0].busy_s, figures[0].wall_s, figures[0].in_flight_mean) == (1.0, 4.0, 2.5)
            world.processes[1].kill()
            assert [(u.model, u.engine) for u in await found.engine_stats()] == [("model", 1), ("reviewer", 0)]
            await settle()
            assert [u.generated_tokens for u in await found.engine_stats()] == [10, 1, 7]
        assert reviewer.closed

    run(test)


def test_engines_beside_the_actors_are_started_with_them() -> None:
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
        async with world.fleet() as found:
            assert found.states() == [SERVING, SERVING]
            assert await found.generate(1, [prompt("a")], SETTINGS) == [("a", 1, 0)]
            assert await found.search(0, prompt("b")) == ("b", 0, 0)
        assert all(process.closed for process in world.processes)

    run(test)


def test_what_a_lost_actor_was_asked_is_asked_of_another_one_and_it_comes_back_with_the_current_weights() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            await world.publish(found, 3)
            first = world.processes[0]
            first.gate.clear()
            asked = asyncio.create_task(found.generate(0, [prompt("a")], SETTINGS))
            await settle()
            first.kill()  # as the kernel would, not the fleet
            assert await asked == [("a", 1, 0)]
            await settle()
            assert found.states() == [SERVING, SERVING] and found.restarts == 1
            again = world.processes[2]
            assert (again.number, again.attempt, again.version) == (0, 1, 3)
            assert await found.generate(0, [prompt("b")], SETTINGS) == [("b", 0, 1)]
            assert world.said == ["actor 0 is lost and replaced: actor 0 died: killed", "actor 0 serves again"]

    run(test)


def test_with_nobody_left_calls_wait_for_a_replacement() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:
            await world.publish(found, 1)
            world.processes[0].kill()
            assert await found.generate(0, [prompt("a")], SETTINGS) == [("a", 0, 1)]
            assert world.processes[1].version == 1

    run(test)


def test_a_hanging_actor_is_lost_by_its_progress_and_a_slow_one_is_not() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            slow, hung = world.processes
            slow.gate.clear()
            hung.gate.clear()
            calls = [asyncio.create_task(found.generate(n, [prompt(f"{n}")], SETTINGS)) for n in range(2)]
            await settle()
            for _ in range(12):  # 24 seconds
                world.now += 2
                slow.steps += 1
                found.look()
                await settle()
            assert hung.killed and not slow.killed
            assert "made no progress within actors.hang_timeout_s = 10.0 s" in world.said[0]
            slow.gate.set()
            assert [each[0][0] for each in await asyncio.gather(*calls)] == ["0", "1"]

    run(test)


def test_an_actor_that_answers_nothing_at_all_is_lost_also_when_it_has_nothing_to_do() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:
            world.looking.clear()
            for _ in range(6):
                found.look()
                await settle()
                world.now += 2
            found.look()
            await settle()
            assert world.processes[0].killed and len(world.processes) == 2

    run(test)


def test_an_idle_actor_may_be_idle_for_any_time() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:
            for _ in range(20):
                found.look()
                await settle()
                world.now += 2
            assert await found.generate(0, [prompt("a")], SETTINGS)
            assert found.restarts == 0

    run(test)


def test_the_time_that_an_actor_takes_to_come_up_is_no_hang() -> None:
    async def test(world: World) -> None:
        async def starting(process: Process) -> None:
            world.now += 60

        world.starting = starting  # type: ignore[method-assign]
        async with world.fleet(count=1) as found:
            found.look()
            world.processes[0].kill()
            await found.generate(0, [prompt("a")], SETTINGS)
            found.look()
            await settle()
            assert found.restarts == 1

    run(test)


def test_the_watch_runs_by_itself() -> None:
    async def test(world: World) -> None:
        world.interval_s = 0.001
        async with world.fleet(count=1) as found:
            world.processes[0].killed = True  # nobody asks it anything but the watch
            while found.restarts == 0:
                await asyncio.sleep(0.001)
            assert [(process.number, process.attempt) for process in world.processes] == [(0, 0), (0, 1)]

    run(test)


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


def test_more_losses_than_allowed_end_the_run_and_the_calls_that_wait() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=1) as found:

            async def starting(process: Process) -> None:
                process.error = EngineError(f"actor 0 died: attempt {process.attempt}") if process.attempt else None

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            with pytest.raises(TooManyFailuresError) as caught:
                await found.generate(0, [prompt("a")], SETTINGS)
            assert caught.value.message == (
                "2 actors were lost within an hour, more than actors.max_restarts = 1; the first: actor 0 died: "
                "killed; the last: actor 0 died: attempt 1"
            )

    run(test)


def test_a_replacement_that_cannot_start_is_one_more_loss() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:

            async def starting(process: Process) -> None:
                process.error = ConfigError("the folder cannot be read now") if process.attempt == 1 else None

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            assert await found.generate(0, [prompt("a")], SETTINGS) == [("a", 0, 2)]
            assert found.restarts == 2

    run(test)


def test_without_restarts_the_first_loss_is_the_error() -> None:
    async def test(world: World) -> None:
        async with world.fleet(max_restarts=0) as found:
            world.processes[1].kill()
            with pytest.raises(EngineError, match="actor 1 died: killed"):
                await found.generate(1, [prompt("a")], SETTINGS)

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
        async with world.fleet() as found:
            await settle()
            assert found.states() == [SERVING, SERVING] and found.restarts == 1
            assert await found.generate(1, [prompt("a")], SETTINGS) == [("a", 1, 1)]
            assert world.said == ["actor 1 is lost and replaced: its host is gone", "actor 1 serves again"]

    run(test)


def test_other_errors_are_no_loss() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            for error in (RlsysError("no module"), AuxiliaryEngineLostError("reviewer engine 0 died")):
                world.processes[0].error = error
                with pytest.raises(type(error), match=error.message):
                    await found.generate(0, [prompt("a")], SETTINGS)
                assert found.states() == [SERVING, SERVING]

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


@pytest.mark.parametrize("seed", range(30))
def test_a_storm(seed: int) -> None:
    """Kills, publishes and calls in random order: every call is answered once, with the weights of its time."""

    async def test(world: World) -> None:
        draw = random.Random(seed)
        answered: list[str] = []
        async with world.fleet(count=3, max_restarts=1000) as found:

            async def ask(name: str) -> None:
                [(back, _, _)] = await found.generate(draw.randrange(3), [prompt(name)], SETTINGS)
                answered.append(back)

            for step in range(12):
                await world.publish(found, step)
                calls = [asyncio.create_task(ask(f"{step}-{n}")) for n in range(8)]
                for _ in range(draw.randrange(6)):
                    for _ in range(draw.randrange(20)):
                        await asyncio.sleep(0)
                    victim = draw.choice([p for p in world.processes if not p.killed] or world.processes)
                    victim.kill()
                await asyncio.gather(*calls)
            found.look()  # those that were killed with nothing to do are found out
            await settle()
            assert found.states() == [SERVING] * 3
            assert len(world.processes) == 3 + found.restarts
        assert sorted(answered) == sorted(f"{step}-{n}" for step in range(12) for n in range(8))
        assert [p.closed for p in world.processes if not p.killed] == [True] * 3

    run(test)


def test_an_answer_that_was_made_of_weights_that_fail_verification_is_asked_for_again() -> None:
    async def test(world: World) -> None:
        async with world.fleet() as found:
            await world.publish(found, 1)
            world.processes[0].gate.clear()
            world.current = None  # what is under way goes on with the new weights
            asked = asyncio.create_task(found.generate(0, [prompt("a")], SETTINGS))
            await settle()

            def check(ack: WeightAck) -> None:
                if ack.actor == "0":
                    raise WeightSyncError("actor 0: log-probabilities differ")

            publish = asyncio.create_task(found.publish(world, offer(2), (), lambda ack: late(ack)))
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


def test_a_driver_that_stood_still_blames_nobody() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=2) as found:
            world.processes[0].gate.clear()
            asked = asyncio.create_task(found.generate(0, [prompt("a")], SETTINGS))
            await settle()
            world.now += 3600
            found.look()
            await settle()
            assert found.restarts == 0
            world.processes[0].gate.set()
            await asked

    run(test)


def test_an_engine_beside_the_actors_that_is_lost_ends_the_run_by_its_own_name() -> None:
    async def test(world: World) -> None:
        reviewer = world.spawn(7, 0)
        reviewer.steps = 5  # and never more
        async with world.fleet(count=1, auxiliary=[("reviewer", 0, reviewer)]) as found:
            for _ in range(7):
                found.look()
                await settle()
                world.now += 2
            with pytest.raises(EngineError, match=r"^reviewer engine 0 made no progress within actors.hang_timeout_s"):
                await found.generate(0, [prompt("a")], SETTINGS)
            assert reviewer.killed and found.restarts == 0

    run(test)


def waiting_actor() -> Any:
    """A rollout actor whose trees all wait for the reviewer."""
    actor: Any = object.__new__(RolloutActor)
    actor.scheduler, actor.rewards, actor.loading = None, SimpleNamespace(verdicts=2), SimpleNamespace(count=0)
    actor.loaded = actor.waited = 0
    actor.engine, actor.auxiliary = (
        SimpleNamespace(steps=3, idle=True),
        {"reviewer": SimpleNamespace(has_open_requests=True)},
    )
    return actor


@pytest.mark.parametrize("fault", ["none", "its engine hangs", "no answer is owed", "it is stopped"])
def test_an_actor_that_waits_for_an_engine_beside_it_does_not_hang_by_itself(fault: str) -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:
            process, actor = world.processes[0], waiting_actor()
            process.progress = actor.progress  # type: ignore[method-assign]
            process.gate.clear()
            asked = asyncio.create_task(found.search(0, prompt("a")))
            await settle()

            async def watch() -> None:
                for _ in range(12):  # 24 seconds
                    found.look()
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
        async with world.fleet(count=1) as found:

            def broken(number: int, attempt: int) -> Process:
                raise ValueError("no such bundle")

            world.spawn = broken  # type: ignore[method-assign]
            world.processes[0].kill()
            with pytest.raises(EngineError, match="supervision of the actors failed: ValueError: no such bundle"):
                await found.generate(0, [prompt("a")], SETTINGS)

    run(test)


def test_a_process_that_cannot_be_killed_is_logged_and_replaced_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:

            def kill() -> None:
                raise RuntimeError("Ray is not there")

            first = world.processes[0]
            first.error = EngineError("actor 0: its engine broke")
            first.kill = kill  # type: ignore[method-assign]
            assert await found.generate(0, [prompt("a")], SETTINGS) == [("a", 0, 1)]

    run(test)
    assert "actor 0 is not used again, but could not be killed" in caplog.text
    assert "RuntimeError: Ray is not there" in caplog.text


def test_a_call_that_breaks_every_actor_ends_the_run_and_names_its_prompts() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=2, max_restarts=100) as found:

            async def starting(process: Process) -> None:
                process.generate = broken  # type: ignore[method-assign]

            async def broken(*_arguments: Any) -> Any:
                raise EngineError("KeyError: 7")

            world.starting = starting  # type: ignore[method-assign]
            for process in world.processes:
                process.generate = broken  # type: ignore[method-assign]
            with pytest.raises(
                TooManyFailuresError, match=r"prompts bad: 5 actors .* were lost; the first: KeyError: 7"
            ):
                await found.generate(0, [prompt("bad")], SETTINGS)

    run(test)


def test_losses_are_counted_within_an_hour() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=1) as found:
            for _ in range(5):
                world.processes[-1].kill()
                await found.generate(0, [prompt("a")], SETTINGS)
                world.now += 3601
            assert found.restarts == 5

    run(test)


def test_nothing_is_started_while_the_fleet_closes() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:
            asked = asyncio.create_task(found.generate(0, [prompt("a")], SETTINGS))
            world.processes[0].gate.clear()
            await settle()
        world.processes[0].kill()
        await asyncio.wait({asked}, timeout=0.2)
        asked.cancel()
        assert len(world.processes) == 1

    run(test)


def test_replacements_that_cannot_be_configured_end_the_run() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=2) as found:

            async def starting(process: Process) -> None:
                raise ConfigError("model.path is gone")

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            with pytest.raises(TooManyFailuresError, match=r"3 actors .*the first: .* killed; the last: model.path is"):
                await found.generate(0, [prompt("a")], SETTINGS)

    run(test)


def test_replacements_that_never_start_end_the_run_however_slowly_they_fail() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1, max_restarts=100) as found:

            async def starting(process: Process) -> None:
                world.now += LOSSES_WITHIN_S  # so that the losses of an hour are never two
                raise EngineError(f"attempt {process.attempt} did not start")

            world.starting = starting  # type: ignore[method-assign]
            world.processes[0].kill()
            message = "5 actors in a row did not start again; the first: attempt 1 did not .*; the last: attempt 5 did"
            with pytest.raises(TooManyFailuresError, match=message):
                await found.generate(0, [prompt("a")], SETTINGS)

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


def test_a_stale_actor_is_watched_too() -> None:
    async def test(world: World) -> None:
        async with world.fleet(count=1) as found:
            await world.publish(found, 1)
            await found.withdraw()
            world.looking.clear()
            for _ in range(7):
                found.look()
                await settle()
                world.now += 2
            assert world.processes[0].killed

    run(test)
