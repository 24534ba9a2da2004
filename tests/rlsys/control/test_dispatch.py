"""Dealing of prompts over actors: shares, order, limits and errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import SAMPLING, FakePool, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.control.dispatch import Rollout, grow, roll_out, sample
from rlsys.errors import EngineError
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [prompt(f"p{number}") for number in range(count)]


def rolled_out(pool: FakePool, searched: list[bool]) -> dict[int, Rollout]:
    results: dict[int, Rollout] = {}

    async def deliver(position: int, result: Rollout) -> None:
        results[position] = result

    asyncio.run(roll_out(pool, prompts(len(searched)), searched, SAMPLING, deliver))
    return results


@settings(deadline=None, max_examples=40)
@given(actors=st.integers(1, 5), searched=st.lists(st.booleans(), max_size=20))
def test_every_prompt_is_delivered_once_and_both_kinds_are_dealt_evenly(actors: int, searched: list[bool]) -> None:
    pool = FakePool(actors, [])
    results = rolled_out(pool, searched)
    assert {position: result.prompt.prompt_id for position, result in results.items()} == {
        position: f"p{position}" for position in range(len(searched))
    }
    sampled = [len(call[2]) for call in pool.calls if call[0] == "generate"]
    trees = [[call for call in pool.calls if call[:2] == ("search", actor)] for actor in range(actors)]
    assert max(sampled, default=0) - min(sampled, default=0) <= 1
    assert max(map(len, trees)) - min(map(len, trees)) <= 1
    assert len(sampled) == min(actors, searched.count(False)), "one call for all prompts that an actor samples"


def test_samples_are_dealt_before_searches_and_in_order() -> None:
    pool = FakePool(2, [])
    rolled_out(pool, [True, False, False, True, False])
    assert sorted(pool.calls) == [
        ("generate", 0, ("p1", "p4")),
        ("generate", 1, ("p2",)),
        ("search", 0, ("p3",)),
        ("search", 1, ("p0",)),
    ]


def test_an_actor_without_a_prompt_gets_no_call() -> None:
    pool = FakePool(3, [])
    results = asyncio.run(sample(pool, prompts(2), SAMPLING))
    assert [result.prompt.prompt_id for result in results] == ["p0", "p1"]
    assert pool.calls == [("generate", 0, ("p0",)), ("generate", 1, ("p1",))]


class Growing:
    """Actors that grow empty trees, each in one turn of the loop."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls: list[tuple[int, str]] = []
        self.under_way = [0] * count
        self.most = 0

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        self.calls.append((actor, prompt.prompt_id))
        self.under_way[actor] += 1
        self.most = max(self.most, *self.under_way)
        await asyncio.sleep(0)
        self.under_way[actor] -= 1
        return TreeFailure(prompt_id=prompt.prompt_id, question="q", answer="a", reason="scripted")

    async def engine_stats(self) -> list[Any]:
        return []

    async def reset_engine_stats(self) -> None: ...


def test_the_number_of_a_prompt_decides_its_actor_and_an_actor_holds_few_trees_at_once() -> None:
    pool, grown = Growing(2), {}
    missing = {number: each for number, each in enumerate(prompts(9)) if number not in (0, 3)}
    asyncio.run(grow(pool, missing, 2, grown.__setitem__))
    assert sorted(pool.calls) == sorted((number % 2, f"p{number}") for number in missing)
    assert {number: tree.prompt_id for number, tree in grown.items()} == {n: f"p{n}" for n in missing}
    assert pool.most == 2


def test_no_tree_begins_after_a_stop_and_an_error_of_the_receiver_ends_the_growing() -> None:
    pool, grown = Growing(1), {}
    asyncio.run(grow(pool, dict(enumerate(prompts(9))), 1, grown.__setitem__, stopped=lambda: len(grown) == 3))
    assert list(grown) == [0, 1, 2]

    def full(number: int, tree: Any) -> None:
        raise EngineError(f"no room for {number}")

    with pytest.raises(EngineError, match="no room for 0"):
        asyncio.run(grow(pool, dict(enumerate(prompts(9))), 2, full))
