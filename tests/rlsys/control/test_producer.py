"""The producer keeps the slots full, replaces failures in place and stops when there are too many."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from fakes import SAMPLING, FakePool, NumberTask
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.control.budgets import FailureLimit, verifier_limit
from rlsys.control.buffer import Buffer
from rlsys.control.dynamic_sampling import GroupFilter
from rlsys.control.producer import Producer, is_searched
from rlsys.data.prompts import PromptBuilder, PromptStream
from rlsys.errors import EngineError, TooManyFailuresError
from rlsys.types import Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup


class Setup:
    """A producer over fakes.

    Args:
        level: names of the prompts whose groups have no learning signal.
    """

    def __init__(
        self,
        actors: int = 2,
        groups_per_step: int = 4,
        max_staleness: int = 0,
        failing: Sequence[str] = (),
        share: float = 0.5,
        failed: int = 0,
        finished: int = 0,
        fraction: float = 0.0,
        rounds: int = 0,
        level: Sequence[str] = (),
        max_verifier_failures: float = 0.1,
    ) -> None:
        self.calls: list[Any] = []
        self.pool = FakePool(actors, self.calls, failing)
        builder = PromptBuilder(NumberTask(None), lambda text: [1] * len(text), max_model_len=8, max_tokens=4)
        self.stream = PromptStream(builder, 0)
        self.buffer = Buffer(groups_per_step, max_staleness)
        self.failures = FailureLimit(
            noun="rollouts", field="train.max_failed_rollouts", share=share, failed=failed, total=failed + finished
        )
        self.asked: list[str] = []
        self.filtering = GroupFilter(
            rounds=rounds, has_signal=self._has_signal, verifications=verifier_limit(max_verifier_failures)
        )
        self.level = {f"train-{name}" for name in level}
        self.producer = Producer(self.pool, self.stream, self.buffer, SAMPLING, self.failures, fraction, self.filtering)

    def _has_signal(self, group: TrajectoryGroup) -> bool:
        self.asked.append(group.prompt.prompt_id)
        return group.prompt.prompt_id not in self.level

    def during(self, scenario: Callable[[], Awaitable[object]]) -> None:
        """Run a scenario while the producer runs; an error of the producer is raised."""

        async def both() -> None:
            producing = asyncio.create_task(self.producer.run())
            waiting = asyncio.ensure_future(scenario())
            await asyncio.wait([producing, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=5)
            waiting.cancel()
            if producing.done():
                await producing
            producing.cancel()
            await asyncio.wait([producing])
            await waiting

        asyncio.run(both())


def ids(groups: Sequence[TrajectoryGroup]) -> list[str]:
    return [group.prompt.prompt_id.removeprefix("train-") for group in groups]


def dispatches(calls: list[Any]) -> list[tuple[int, list[str]]]:
    return [(actor, [name.removeprefix("train-") for name in names]) for _, actor, names in calls]


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


def test_a_failure_is_counted_and_replaced_by_the_next_prompt_in_its_place() -> None:
    setup = Setup(actors=2, groups_per_step=4, failing=["train-1"])

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["0", "4", "2", "3"]
        assert setup.failures.failed == 1
        assert dispatches(setup.calls)[2:] == [(0, ["4"])]

    setup.during(scenario)


def test_a_replacement_may_fail_too() -> None:
    setup = Setup(groups_per_step=8, failing=["train-1", "train-8"])

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["0", "9", "2", "3", "4", "5", "6", "7"]
        assert setup.failures.failed == 2

    setup.during(scenario)


@pytest.mark.parametrize("slow", [0, 1])
def test_replacements_do_not_depend_on_which_actor_answers_first(slow: int) -> None:
    # Prompts 0 and 1 fail on different actors: 4 replaces 0 and 5 replaces 1, in either order of the answers.
    setup = Setup(actors=2, groups_per_step=4, failing=["train-0", "train-1"])
    generate = setup.pool.generate

    async def late(
        actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        for _ in range(10 if actor == slow else 0):
            await asyncio.sleep(0)
        return await generate(actor, prompts, settings)

    setup.pool.generate = late  # type: ignore[method-assign]  # the scripted delay

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["4", "5", "2", "3"]

    setup.during(scenario)


def test_groups_without_a_signal_are_replaced_with_the_failures_in_order_of_issue() -> None:
    setup = Setup(actors=2, groups_per_step=4, rounds=1, level=["0", "2"], failing=["train-1"])

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["4", "5", "6", "3"]
        assert dispatches(setup.calls)[2:] == [(0, ["4", "6"]), (1, ["5"])]
        # A group is 2 samples of 2 tokens. Rollouts: 0, 2, 3, 1 and three more.
        assert (setup.filtering.groups, setup.filtering.tokens) == (2, 8)
        assert (setup.failures.failed, setup.failures.total) == (1, 7)

    setup.during(scenario)


@pytest.mark.parametrize(("rounds", "taken"), [(0, "0"), (1, "4"), (2, "5"), (3, "6"), (4, "6")])
def test_after_the_last_round_a_group_is_taken_as_it_is(rounds: int, taken: str) -> None:
    # 0 is replaced by 4, 4 by 5 and 5 by 6, which has a signal; with fewer rounds the last replacement is trained.
    setup = Setup(groups_per_step=4, rounds=rounds, level=["0", "4", "5"])

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == [taken, "1", "2", "3"]
        assert setup.filtering.groups == min(rounds, 3)

    setup.during(scenario)


def test_every_wave_has_all_rounds() -> None:
    setup = Setup(groups_per_step=2, rounds=1, level=["0", "2", "3", "4"])

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["2", "1"]
        await setup.buffer.release()
        assert ids(await setup.buffer.take()) == ["5", "6"]

    setup.during(scenario)


def test_without_rounds_no_group_is_looked_at() -> None:
    setup = Setup(groups_per_step=4, level=["0", "1", "2", "3"], failing=["train-3"])

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["0", "1", "2", "4"]
        assert (setup.asked, setup.filtering.groups, setup.filtering.unlogged_tokens) == ([], 0, 0)

    setup.during(scenario)


def test_a_round_in_which_only_failures_are_replaced_counts_as_none() -> None:
    # 0 fails, so 4 comes in its place, and teaches nothing: the one round is still there.
    setup = Setup(groups_per_step=4, rounds=1, level=["4"], failing=["train-0"])

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["5", "1", "2", "3"]

    setup.during(scenario)


def test_a_failure_after_the_last_round_is_replaced_all_the_same() -> None:
    setup = Setup(groups_per_step=4, rounds=1, level=["0", "5"], failing=["train-4"])

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["5", "1", "2", "3"]
        assert (setup.filtering.groups, setup.failures.failed) == (1, 1)

    setup.during(scenario)


def test_a_tree_without_a_signal_is_replaced_by_the_next_prompt_of_either_kind() -> None:
    # 1 and 3 are searched, and 5. 1 is replaced by 4, which is sampled, and 3 by 5. A tree is 10 tokens.
    setup = Setup(actors=1, groups_per_step=4, fraction=0.5, rounds=1, level=["1", "3"])

    async def scenario() -> None:
        groups = await setup.buffer.take()
        assert ids(groups) == ["0", "4", "2", "5"]
        assert [group.searched for group in groups] == [False, False, False, True]
        assert setup.filtering.tokens == 20

    setup.during(scenario)


@pytest.mark.parametrize("slow", [0, 1])
def test_replacements_for_want_of_a_signal_do_not_depend_on_which_actor_answers_first(slow: int) -> None:
    setup = Setup(actors=2, groups_per_step=4, rounds=2, level=["0", "1", "5"], failing=["train-3"])
    generate = setup.pool.generate

    async def late(
        actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        for _ in range(10 if actor == slow else 0):
            await asyncio.sleep(0)
        return await generate(actor, prompts, settings)

    setup.pool.generate = late  # type: ignore[method-assign]  # the scripted delay

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["4", "7", "2", "6"]

    setup.during(scenario)


@settings(max_examples=50, deadline=None)
@given(
    level=st.sets(st.integers(0, 30)),
    failing=st.sets(st.integers(0, 30), max_size=5),
    rounds=st.integers(0, 3),
    max_staleness=st.integers(0, 2),
)
def test_every_issued_prompt_is_consumed_filtered_failed_or_in_flight(
    level: set[int], failing: set[int], rounds: int, max_staleness: int
) -> None:
    setup = Setup(
        groups_per_step=3,
        max_staleness=max_staleness,
        share=1.0,
        rounds=rounds,
        level=[str(index) for index in level],
        failing=[f"train-{index}" for index in failing],
        finished=99,
    )

    async def scenario() -> None:
        consumed: list[int] = []
        for _ in range(4):
            consumed += [int(name) for name in ids(await setup.buffer.take())]
            in_flight = setup.buffer.in_flight()
            gone = setup.filtering.groups + setup.failures.failed
            assert setup.stream.cursor == len(consumed) + gone + len(in_flight)
            assert len({*consumed, *in_flight}) == len(consumed) + len(in_flight)
            assert not failing & {*consumed}
            await setup.buffer.release()
        if not rounds:
            assert setup.filtering.groups == 0
        assert setup.filtering.tokens == setup.filtering.unlogged_tokens == 4 * setup.filtering.groups

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
