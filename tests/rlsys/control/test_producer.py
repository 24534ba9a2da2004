"""The producer keeps the slots full, and stops when there are too many failures."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from producer_setup import Setup, dispatches, ids

from rlsys.control.producer import is_searched
from rlsys.errors import EngineError, TooManyFailuresError
from rlsys.types import Prompt, RolloutFailure, TrajectoryGroup


def test_all_free_slots_are_dealt_over_the_actors_in_one_dispatch_each() -> None:
    setup = Setup(actors=2, groups_per_step=4)

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["0", "1", "2", "3"]
        assert dispatches(setup.calls) == [(0, ["0", "2"]), (1, ["1", "3"])]
        await setup.buffer.release()
        assert ids(await setup.buffer.take()) == ["4", "5", "6", "7"]
        assert dispatches(setup.calls)[2:] == [(0, ["4", "6"]), (1, ["5", "7"])]

    setup.during(scenario)


def test_searched_prompts_are_evenly_spread() -> None:
    # f = 2/5: floor((i + 1) f) is 0 0 1 1 2 for i = 0..4, and steps up at i = 2 and i = 4
    assert [is_searched(index, 0.4) for index in range(10)] == [False, False, True, False, True] * 2
    assert not any(is_searched(index, 0.0) for index in range(99))
    assert all(is_searched(index, 1.0) for index in range(99))


@given(fraction=st.floats(0, 1), start=st.integers(0, 10**6), count=st.integers(1, 200))
def test_any_stretch_of_the_stream_holds_the_fraction(fraction: float, start: int, count: int) -> None:
    searched = sum(is_searched(index, fraction) for index in range(start, start + count))
    assert abs(searched - count * fraction) <= 1 + 1e-6


def test_an_actor_samples_in_one_dispatch_and_searches_one_by_one_and_groups_keep_their_order() -> None:
    # 1, 3, 5 and 7 are searched: 2 a kind for either actor, where dealing by place would give one actor all of a kind.
    setup = Setup(actors=2, groups_per_step=8, fraction=0.5)

    async def scenario() -> None:
        groups = await setup.buffer.take()
        assert ids(groups) == ["0", "1", "2", "3", "4", "5", "6", "7"]
        assert [group.searched for group in groups] == [False, True] * 4
        assert [call[0] for call in setup.calls] == ["generate", "search", "search"] * 2
        own = [(0, ["0", "4"]), (0, ["1"]), (0, ["5"]), (1, ["2", "6"]), (1, ["3"]), (1, ["7"])]
        assert dispatches(setup.calls) == own

    setup.during(scenario)


def test_a_slow_search_does_not_keep_the_samples_of_its_actor() -> None:
    setup = Setup(actors=1, groups_per_step=2, fraction=0.5)
    search, hold = setup.pool.search, asyncio.Event()

    async def slow(actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        await hold.wait()
        return await search(actor, prompt)

    setup.pool.search = slow  # type: ignore[method-assign]  # the scripted delay

    async def scenario() -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        assert setup.failures.total == 1  # the sampled one is in its slot
        hold.set()
        assert ids(await setup.buffer.take()) == ["0", "1"]

    setup.during(scenario)


def test_no_tree_waits_for_another_of_its_actor_and_wave() -> None:
    # Two steps of two trees are under way on one actor; the last one never ends. The first step has its groups.
    setup = Setup(actors=1, groups_per_step=2, max_staleness=1, fraction=1.0)
    search = setup.pool.search

    async def endless(actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        if prompt.prompt_id == "train-3":
            await asyncio.Event().wait()
        return await search(actor, prompt)

    setup.pool.search = endless  # type: ignore[method-assign]  # the scripted delay

    async def scenario() -> None:
        async with asyncio.timeout(2):
            assert ids(await setup.buffer.take()) == ["0", "1"]

    setup.during(scenario)


def test_replacements_of_failed_searches_do_not_depend_on_which_answers_first() -> None:
    # All four fail: 4 replaces 0, 5 replaces 1 and so on, though they answer the other way round.
    setup = Setup(actors=1, groups_per_step=4, fraction=1.0, failing=[f"train-{n}" for n in range(4)], finished=99)
    search = setup.pool.search

    async def backwards(actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        for _ in range(20 - 5 * int(prompt.prompt_id.removeprefix("train-"))):
            await asyncio.sleep(0)
        return await search(actor, prompt)

    setup.pool.search = backwards  # type: ignore[method-assign]  # the scripted delay

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["4", "5", "6", "7"]

    setup.during(scenario)


def test_where_all_are_searched_nothing_is_sampled() -> None:
    setup = Setup(actors=2, groups_per_step=4, fraction=1.0)

    async def scenario() -> None:
        assert all(group.searched for group in await setup.buffer.take())
        assert setup.calls == [("search", n // 2, (f"train-{name}",)) for n, name in enumerate((0, 2, 1, 3))]

    setup.during(scenario)


def test_a_failed_search_is_counted_and_its_replacement_is_of_its_own_kind() -> None:
    # 1 and 3 are searched. 1 fails; 4 takes its place and is sampled: that follows from its own index.
    setup = Setup(actors=1, groups_per_step=4, fraction=0.5, failing=["train-1"])

    async def scenario() -> None:
        groups = await setup.buffer.take()
        assert ids(groups) == ["0", "4", "2", "3"]
        assert [group.searched for group in groups] == [False, False, False, True]
        assert (setup.failures.failed, setup.failures.total) == (1, 5)

    setup.during(scenario)


def test_failed_searches_and_failed_samples_are_one_count() -> None:
    # 14 good ones; then 0, sampled, is 1 of 15 (allowed 1.5) and 1, searched, 2 of 16 (allowed 1.6).
    setup = Setup(groups_per_step=16, fraction=0.5, failing=["train-0", "train-1"], share=0.1)
    with pytest.raises(ExceptionGroup) as caught:
        setup.during(asyncio.Event().wait)
    assert caught.group_contains(TooManyFailuresError, match="2 of 16 rollouts")


def test_staleness_fills_more_slots_at_once_and_no_more_than_there_are() -> None:
    setup = Setup(actors=2, groups_per_step=2, max_staleness=1)

    async def scenario() -> None:
        await setup.buffer.take()
        for _ in range(20):
            await asyncio.sleep(0)
        assert dispatches(setup.calls) == [(0, ["0", "2"]), (1, ["1", "3"])]

    setup.during(scenario)


def test_an_actor_without_a_prompt_is_left_alone() -> None:
    setup = Setup(actors=3, groups_per_step=2)

    async def scenario() -> None:
        await setup.buffer.take()
        assert dispatches(setup.calls) == [(0, ["0"]), (1, ["1"])]

    setup.during(scenario)


def test_above_the_share_the_run_ends_and_says_why() -> None:
    # 11 good ones; then the failures: 1 of 12 (allowed 2.4), 2 of 13 (allowed 2.6), 3 of 14 (allowed 2.8).
    failing = ["train-0", "train-1", "train-3", "train-5", "train-7"]
    setup = Setup(groups_per_step=16, failing=failing, share=0.2)
    with pytest.raises(ExceptionGroup) as caught:
        setup.during(asyncio.Event().wait)
    error = caught.value.exceptions[0]
    assert isinstance(error, TooManyFailuresError)
    assert "3 of 14 rollouts failed" in error.message
    assert "train.max_failed_rollouts = 0.2" in error.message
    assert "scripted" in error.message


def test_the_share_does_not_depend_on_the_place_of_the_failures_in_a_batch() -> None:
    # 2 failures of 10 at the front: judged one by one they would be 2 of 2.
    setup = Setup(actors=1, groups_per_step=10, failing=["train-0", "train-1"], share=0.2)

    async def scenario() -> None:
        await setup.buffer.take()
        assert setup.failures.failed == 2

    setup.during(scenario)


def test_a_resumed_run_knows_what_was_finished_before() -> None:
    # 10 failures in 200 before: an 11th is 5 %, not 11 of 11.
    setup = Setup(failing=["train-1"], share=0.1, failed=10, finished=190)

    async def scenario() -> None:
        await setup.buffer.take()
        assert setup.failures.failed == 11

    setup.during(scenario)


def test_share_0_tolerates_none() -> None:
    setup = Setup(groups_per_step=8, failing=["train-7"], share=0.0)
    with pytest.raises(ExceptionGroup) as caught:
        setup.during(asyncio.Event().wait)
    assert caught.group_contains(TooManyFailuresError, match="1 of 8")


def test_the_error_of_a_dispatch_ends_the_producer() -> None:
    setup = Setup()
    setup.pool.error = EngineError("actor 1 died")
    with pytest.raises(ExceptionGroup) as caught:
        setup.during(asyncio.Event().wait)
    assert caught.group_contains(EngineError, match="actor 1 died")
