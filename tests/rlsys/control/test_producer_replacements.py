"""The producer replaces failures and groups without a signal in place, by the next prompts of the stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes import group, prompt, searched_group
from hypothesis import given, settings
from hypothesis import strategies as st
from producer_setup import Setup, dispatches, ids

from rlsys.control.dispatch import Rollout
from rlsys.control.producer import is_unsolved
from rlsys.types import RolloutFailure, TrajectoryGroup


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
    setup.delay(slow)

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
    setup.delay(slow)

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


def test_an_unsolved_prompt_is_searched_in_its_place_and_others_are_replaced() -> None:
    # No sample solves 0 and 1; those of 2 are all right. The tree of 0 has a signal, that of 1 has none.
    setup = Setup(actors=2, groups_per_step=4, rounds=2, unsolved=True)
    setup.pool.unsolved = {"train-0", "train-1"}
    seen: list[str] = []

    def has_signal(group: TrajectoryGroup) -> bool:
        seen.append(f"{group.prompt.prompt_id.removeprefix('train-')}{' searched' if group.searched else ''}")
        return seen[-1] in ("0 searched", "3", "4", "5")

    setup.filtering.has_signal = has_signal

    async def scenario() -> None:
        assert ids(await setup.buffer.take()) == ["0", "5", "4", "3"]
        assert {call[2] for call in setup.calls if call[0] == "search"} == {("train-0",), ("train-1",)}
        assert sorted(seen) == ["0 searched", "1 searched", "2", "3", "4"]
        assert setup.filtering.groups == 4  # the samples of 0, 1 and 2, and the tree of 1

    setup.during(scenario)


def partial_rewards(outcome: Any, reward: float) -> TrajectoryGroup:
    """Return a group whose rewards are sums of parts."""
    sampled = group(prompt("a"), 0, [reward, reward])
    parts = {"task": float(outcome == "ok"), "mine": reward}
    trajectories = (replace(t, outcome=outcome, parts=parts) for t in sampled.trajectories)
    return replace(sampled, trajectories=tuple(trajectories))


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        (group(prompt("a"), 0, [0.0, 0.0]), True),
        (group(prompt("a"), 0, [0.0, 1.0]), False),
        (group(prompt("a"), 0, [0.0, -1.0]), True),
        (partial_rewards("wrong", 0.2), True),
        (partial_rewards("ok", -0.2), False),
        (searched_group(prompt("a"), rewards=(0.0, 0.0)), False),
        (RolloutFailure(prompt=prompt("a"), reason="lost"), False),
    ],
)
def test_a_prompt_is_unsolved_if_no_sample_was_right(rollout: Rollout, expected: bool) -> None:
    assert is_unsolved(rollout) is expected
