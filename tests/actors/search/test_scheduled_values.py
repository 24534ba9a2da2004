"""Values of nodes in the event loop: any timing gives the same trees, and an end leaves no request behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from search_engines import WORLD, Judges, ThreadEngine
from search_world import codec, grow, prompt

from actors.search.requests import Value, Values
from actors.search.scheduler import TreeScheduler
from actors.search.starting import RoleEngine, SchedulerSettings
from rlsys.config.search import SearchConfig, StopConfig
from rlsys.config.search_values import StepsValueConfig
from rlsys.errors import EngineError
from rlsys.search.tree_json import tree_line
from rlsys.trees import Tree
from rlsys.types import Prompt

CONFIG = SearchConfig(max_depth=6, stop=StopConfig(simulations=24), value=StepsValueConfig(type="steps"))


class Valuer:
    """A source of values that answers after a random time, unless `first` raises or waits for ever."""

    def __init__(self, seed: int, first: Callable[[], object] = lambda: None) -> None:
        self.rng, self.first = random.Random(seed), first
        self.open = 0

    async def values(self, of: Prompt, request: Value, affinity: int) -> Values:
        self.open += 1
        try:
            if isinstance(waiting := self.first(), asyncio.Event):
                await waiting.wait()
            for _ in range(self.rng.randrange(4)):
                await asyncio.sleep(0)
            return WORLD.value(request)
        finally:
            self.open -= 1


def scheduler(engine: ThreadEngine, valuer: Valuer) -> TreeScheduler:
    role = RoleEngine(engine=engine, model="tags model", codec=codec("tags"), max_model_len=600)
    settings = SchedulerSettings(
        config=CONFIG,
        patterns={"a": WORLD.pattern},
        seed=0,
        temperature=1.0,
        top_p=1.0,
        max_chain_tokens=500,
        in_flight=16,
    )
    return TreeScheduler({"policy": role}, Judges(), settings, valuer)


@pytest.mark.parametrize("seed", [0, 1])
def test_trees_do_not_depend_on_when_values_arrive(seed: int) -> None:
    engine, names = ThreadEngine(seed=seed), [f"p{number}" for number in range(8)]

    async def main() -> list[Tree]:
        searching = scheduler(engine, Valuer(seed))
        async with asyncio.timeout(20):
            return await asyncio.gather(*(searching.grow(prompt(name)) for name in names))

    trees = asyncio.run(main())
    engine.close()
    assert [tree_line(tree) for tree in trees] == [tree_line(grow(WORLD, CONFIG, prompt_id=n).tree) for n in names]
    assert sum(tree.counts["values"] for tree in trees) > 100
    assert sum(tree.counts.get("wrong_step", 0) for tree in trees) > 10
    assert sum(tree.failed_values for tree in trees) > 0


def test_an_error_of_the_source_ends_the_tree() -> None:
    def breaks() -> None:
        raise EngineError("the judge broke")

    engine = ThreadEngine()

    async def main() -> None:
        with pytest.raises(EngineError, match="the judge broke"):
            await scheduler(engine, Valuer(0, breaks)).grow(prompt("p"))

    asyncio.run(asyncio.wait_for(main(), 20))
    engine.close()


def test_a_cancelled_tree_cancels_its_values() -> None:
    engine = ThreadEngine()

    async def main() -> None:
        valuer = Valuer(0, asyncio.Event)
        task = asyncio.create_task(scheduler(engine, valuer).grow(prompt("p")))
        while not valuer.open:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert valuer.open == 0

    asyncio.run(asyncio.wait_for(main(), 20))
    engine.close()
