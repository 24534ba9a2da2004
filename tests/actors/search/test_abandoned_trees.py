"""A tree that nobody waits for leaves no request in its engine."""

from __future__ import annotations

import asyncio

import pytest
from search_engines import WORLD, Judges, ThreadEngine
from search_world import codec, prompt

from actors.search.scheduler import TreeScheduler
from actors.search.starting import RoleEngine, SchedulerSettings
from rlsys.config.search import SearchConfig, StopConfig
from rlsys.errors import RolloutError
from rlsys.trees import TreeFailure


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_nothing_is_left_in_the_engine_for_a_tree_that_nobody_waits_for(end: str) -> None:
    engine = ThreadEngine(silent=lambda request: True)
    role = RoleEngine(engine=engine, model="tags model", codec=codec("tags"), max_model_len=600)
    config = SearchConfig(max_depth=6, stop=StopConfig(simulations=24))
    settings = SchedulerSettings(
        config=config,
        patterns={"a": WORLD.pattern},
        seed=0,
        temperature=1.0,
        top_p=1.0,
        max_chain_tokens=500,
        in_flight=16,
    )
    scheduler = TreeScheduler({"policy": role}, Judges(), settings)

    async def main() -> None:
        task = asyncio.create_task(scheduler.grow(prompt("p")))
        while len(engine.futures) < 2:
            await asyncio.sleep(0.001)
        if end == "cancelled":
            task.cancel()
        else:
            engine.futures[0].set_exception(RolloutError("too long"))
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError if end == "cancelled" else TreeFailure)
        await asyncio.sleep(0.05)
        assert all(future.done() for future in engine.futures)
        assert any(future.cancelled() for future in engine.futures)
        assert scheduler._in_flight == 0, "other trees are admitted again"

    asyncio.run(asyncio.wait_for(main(), 20))
    engine.close()
