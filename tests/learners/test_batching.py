"""Rows, parts, micro-batch plans and the shift to targets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learners.batching import (
    Row,
    collate,
    plan_micro_batches,
    rows_from_demonstrations,
    rows_from_groups,
    split_updates,
)
from rlsys.types import Demonstration, Outcome, Prompt, Step, Trajectory, TrajectoryGroup, VersionSpan


def make_row(tokens: list[int], mask: list[int], logprobs: list[float], advantage: float) -> Row:
    return Row(
        token_ids=np.array(tokens, dtype=np.int32),
        loss_mask=np.array(mask, dtype=bool),
        behavior_logprobs=np.array(logprobs, dtype=np.float32),
        advantages=np.full(len(tokens), advantage, dtype=np.float32),
    )


def make_group(*results: tuple[Outcome, float]) -> TrajectoryGroup:
    trajectories = tuple(
        Trajectory(
            token_ids=np.array([1, 2, 10 + index], dtype=np.int32),
            loss_mask=np.array([False, False, True]),
            behavior_logprobs=np.array([0.0, 0.0, -index], dtype=np.float32),
            versions=(VersionSpan(start=2, version=0),),
            finish_reason="stop",
            reward=reward,
            outcome=outcome,
            answered=True,
        )
        for index, (outcome, reward) in enumerate(results)
    )
    prompt = Prompt(prompt_id="p", token_ids=np.array([1, 2], dtype=np.int32), answer="")
    return TrajectoryGroup(prompt=prompt, trajectories=trajectories)


def test_rows_of_groups_carry_advantages_and_leave_failures_out():
    # valid rewards 1, 0: mean 1/2. The timeout's reward of 9 counts nowhere.
    group = make_group(("ok", 1.0), ("timeout", 9.0), ("wrong", 0.0), ("error", math.nan))
    rows, nothing = rows_from_groups([group, make_group(("error", 0.0), ("error", 0.0))], use_std=False)
    assert [row.advantages.tolist() for row in rows] == [[0.5] * 3, [-0.5] * 3]
    assert [row.token_ids[2] for row in rows] == [10, 12]
    assert [row.behavior_logprobs[2] for row in rows] == [0.0, -2.0]
    assert nothing == []


def test_rows_of_groups_divide_by_the_standard_deviation():
    # deviations +-1/2: sum of squares 1/2 over n - 1 = 1: std sqrt(1/2)
    ((better, worse),) = rows_from_groups([make_group(("ok", 1.0), ("wrong", 0.0))], use_std=True)
    assert better.advantages.tolist() == [np.float32(0.5 / (math.sqrt(0.5) + 1e-6))] * 3
    assert (worse.advantages == -better.advantages).all()


def test_rows_of_demonstrations():
    mask = np.array([False, True, True])
    (row,) = rows_from_demonstrations([Demonstration(token_ids=np.array([4, 5, 6], dtype=np.int32), loss_mask=mask)])
    assert (row.advantages.tolist(), row.length, row.loss_tokens) == ([1.0] * 3, 3, 2)
    assert row.loss_mask.tolist() == [False, True, True]
    assert row.behavior_logprobs.tolist() == [0.0, 0.0, 0.0]


def test_collate_by_hand():
    rows = [
        make_row([5, 6, 7, 8], [0, 0, 1, 1], [0, 0, -0.5, -0.25], 2.0),
        make_row([9, 6, 7], [0, 0, 1], [0, 0, -1.5], -1.0),
    ]
    batch = collate(rows, pad_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 6, 7, 3]]
    # target column s is token s + 1
    assert batch.loss_mask.tolist() == [[False, True, True], [False, True, False]]
    assert batch.behavior_logprobs.tolist() == [[0, -0.5, -0.25], [0, -1.5, 0]]
    assert batch.behavior_logprobs[batch.loss_mask].tolist() == [-0.5, -0.25, -1.5]
    assert batch.row_ids.tolist() == [0, 0, 1]
    assert batch.advantages.tolist() == [2.0, 2.0, -1.0]
    assert batch.first_target == 1  # token 2 is the first one trained; logits 1 and 2 predict all targets
    assert (batch.input_ids.dtype, batch.loss_mask.dtype) == (torch.int64, torch.bool)
    assert (batch.behavior_logprobs.dtype, batch.advantages.dtype) == (torch.float32, torch.float32)


def test_the_first_token_is_never_a_target():
    # it has no prediction; the denominator must not count it either
    row = make_row([5, 6, 7], [1, 0, 1], [-1, 0, -2], 1.0)
    batch = collate([row], pad_id=0)
    assert row.loss_tokens == int(batch.loss_mask.sum()) == 1
    assert batch.loss_mask.tolist() == [[False, True]]


def test_nothing_to_train_still_makes_a_batch():
    empty = collate([], pad_id=3)
    assert empty.input_ids.tolist() == [[3, 3]]
    assert empty.loss_mask.tolist() == [[False]]
    assert (empty.advantages.tolist(), empty.row_ids.tolist(), empty.first_target) == ([], [], 0)
    single = collate([make_row([5], [1], [-1], 1.0)], pad_id=3)
    assert (single.input_ids.tolist(), single.loss_mask.tolist()) == ([[5, 3]], [[False]])
    untrained = collate([make_row([5, 6, 7, 8], [0, 0, 0, 0], [0, 0, 0, 0], 1.0)], pad_id=3)
    assert untrained.first_target == 2  # the last column: one logit of one position is enough


def test_advantages_are_those_of_the_targets_and_nothing_else_is_read():
    row = make_row([5, 6, 7, 8], [0, 1, 0, 1], [0, -1, 0, -2], 0.0)
    spoiled = replace(row, advantages=np.array([np.nan, 0.5, np.nan, -0.25], dtype=np.float32))
    batch = collate([spoiled, make_row([5, 6], [0, 1], [0, -3], 2.0)], pad_id=0)
    assert batch.advantages.tolist() == [0.5, -0.25, 2.0]
    assert batch.row_ids.tolist() == [0, 0, 1]


def make_searched(
    *chains: tuple[Sequence[int], Outcome, float], forced: Sequence[int] = (), samples: Mapping[int, int] | None = None
) -> TrajectoryGroup:
    """Trajectories over nodes of two tokens, 10 n and 10 n + 1, after a prompt of two.

    forced: nodes whose first token the policy did not choose.
    """
    trajectories = []
    for nodes, outcome, reward in chains:
        tokens = [1, 2, *(token for node in nodes for token in (10 * node, 10 * node + 1))]
        mask = [False, False, *(flag for node in nodes for flag in (node not in forced, True))]
        steps = tuple(
            Step(
                node=node,
                parent=parent,
                start=2 + 2 * place,
                stop=4 + 2 * place,
                type="thinking",
                samples=(samples or {}).get(node, 1),
                visits=0,
                value=None,
            )
            for place, (parent, node) in enumerate(itertools.pairwise((0, *nodes)))
        )
        trajectories.append(
            Trajectory(
                token_ids=np.array(tokens, dtype=np.int32),
                loss_mask=np.array(mask),
                behavior_logprobs=np.where(mask, -np.array(tokens), 0).astype(np.float32),
                versions=(VersionSpan(start=2, version=0),),
                finish_reason="stop",
                reward=reward,
                outcome=outcome,
                answered=True,
                steps=steps,
            )
        )
    prompt = Prompt(prompt_id="p", token_ids=np.array([1, 2], dtype=np.int32), answer="")
    return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories), searched=True)


def trained(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """(token, advantage) of all targets that a batch of the rows trains."""
    batch = collate(rows, pad_id=0)
    return list(zip(batch.input_ids[:, 1:][batch.loss_mask].tolist(), batch.advantages.tolist(), strict=True))


def test_searched_rows_by_hand():
    # Node 1 holds 2 (right) and 3 (wrong): V(1) = 1/2; node 4 was right: V(4) = 1; V(0) = 3/4.
    group = make_searched(([1, 2], "ok", 1.0), ([1, 3], "wrong", 0.0), ([4], "ok", 1.0), forced=[2, 4])
    (rows,) = rows_from_groups([group], use_std=False)
    assert [row.token_ids.tolist() for row in rows] == [[1, 2, 10, 11, 20, 21], [1, 2, 10, 11, 30, 31], [1, 2, 40, 41]]
    # Node 1 is trained by the first row alone; the first tokens of 2 and 4 were put there.
    assert trained(rows) == [(10, -0.25), (11, -0.25), (21, 0.5), (30, -0.5), (31, -0.5), (41, 0.25)]
    # Denominators count the same targets.
    assert [row.loss_tokens for row in rows] == [3, 2, 1]
    assert rows[1].behavior_logprobs.tolist() == [0, 0, -10, -11, -30, -31]


def test_a_node_drawn_three_times_weighs_three_times_as_much_within_its_group():
    # V(1) = 1, V(2) = 0, drawn 3 times and once: V(0) = 3/4, A(1) = 1/4, A(2) = -3/4. Two trained tokens each, so the
    # mean of the draws is (3 + 3 + 1 + 1) / 4 = 2: the weights are 3/2 and 1/2, and 3/8 - 3/8 = 0 as for four samples.
    group = make_searched(([1], "ok", 1.0), ([2], "wrong", 0.0), samples={1: 3})
    (rows,) = rows_from_groups([group], use_std=False)
    assert trained(rows) == [(10, 0.375), (11, 0.375), (20, -0.375), (21, -0.375)]
    # Of the group of four samples that it stands for, the weights sum to the number of tokens all the same.
    (same,) = rows_from_groups(
        [make_searched(([1], "ok", 1.0), ([2], "wrong", 0.0), samples={1: 6, 2: 2})], use_std=False
    )
    assert trained(same) == trained(rows)


def test_a_searched_row_in_which_nothing_is_left_to_train_is_dropped():
    # The second trajectory ends in a node that the first goes on from; the third was never judged, nor is its node.
    group = make_searched(([1, 2], "ok", 1.0), ([1], "wrong", 0.0), ([3], "error", math.nan))
    (rows,) = rows_from_groups([group], use_std=False)
    assert [row.token_ids.tolist() for row in rows] == [[1, 2, 10, 11, 20, 21]]
    # V(2) = 1, the end at node 1 is 0: V(1) = 1/2, the only child of the prompt.
    assert trained(rows) == [(10, 0.0), (11, 0.0), (20, 0.5), (21, 0.5)]


def test_an_unjudged_trajectory_leaves_its_shared_nodes_to_the_next_one():
    group = make_searched(([1, 2], "timeout", 9.0), ([1, 3], "ok", 1.0), ([4], "wrong", 0.0))
    (rows,) = rows_from_groups([group], use_std=False)
    assert trained(rows) == [(10, 0.5), (11, 0.5), (30, 0.0), (31, 0.0), (40, -0.5), (41, -0.5)]


def test_tokens_of_no_node_are_not_trained():
    group = make_searched(([1], "ok", 1.0), ([2], "wrong", 0.0))
    longer = [
        replace(
            trajectory,
            token_ids=np.append(trajectory.token_ids, 99).astype(np.int32),
            loss_mask=np.append(trajectory.loss_mask, True),
            behavior_logprobs=np.append(trajectory.behavior_logprobs, -1).astype(np.float32),
        )
        for trajectory in group.trajectories
    ]
    (rows,) = rows_from_groups([replace(group, trajectories=tuple(longer))], use_std=False)
    assert trained(rows) == [(10, 0.5), (11, 0.5), (20, -0.5), (21, -0.5)]


def test_a_searched_group_without_trajectories_gives_no_rows():
    assert rows_from_groups([make_searched()], use_std=True) == [[]]


@given(data=st.data(), use_std=st.booleans())
def test_every_node_of_a_judged_trajectory_is_trained_exactly_once(data, use_std):
    # Paths to nodes of a random tree; a node may be the end of several trajectories and the middle of others.
    parents = [0, *(data.draw(st.integers(0, number - 1)) for number in range(1, data.draw(st.integers(2, 9))))]

    def path(node: int) -> list[int]:
        return [*path(parents[node]), node] if node else []

    ends = data.draw(st.lists(st.integers(1, len(parents) - 1), min_size=1, max_size=6))
    results = st.tuples(st.sampled_from(["ok", "wrong", "error"]), st.sampled_from([0.0, 0.5, 1.0]))
    chains = [(path(end), *data.draw(results)) for end in ends]
    forced = data.draw(st.lists(st.integers(1, 9)))
    (rows,) = rows_from_groups([make_searched(*chains, forced=forced)], use_std=use_std)
    nodes = {node for nodes, outcome, _ in chains if outcome != "error" for node in nodes}
    expected = sorted(
        token for node in nodes for token in (10 * node, 10 * node + 1) if token // 10 not in forced or token % 10
    )
    assert sorted(token for token, _ in trained(rows)) == expected
    assert all(row.loss_tokens for row in rows)


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=20), data=st.data(), seed=st.integers(0, 99))
def test_split_keeps_groups_whole_and_even(sizes, data, seed):
    updates = data.draw(st.integers(1, len(sizes)))
    groups = [
        [make_row([group, member], [0, 1], [0, 0], 1.0) for member in range(size)] for group, size in enumerate(sizes)
    ]
    parts = split_updates(groups, updates, seed=seed)
    homes = [{int(row.token_ids[0]) for row in part} for part in parts]
    assert len(parts) == updates
    assert sum(len(part) for part in parts) == sum(sizes)
    assert sum(len(home) for home in homes) == sum(size > 0 for size in sizes)  # no group in two parts
    if min(sizes) > 0:
        assert max(map(len, homes)) - min(map(len, homes)) <= 1
    again = split_updates(groups, updates, seed=seed)
    assert [[id(row) for row in part] for part in again] == [[id(row) for row in part] for part in parts]


def test_split_shuffles_by_its_seed():
    groups = [[make_row([group, 0], [0, 1], [0, 0], 1.0)] for group in range(32)]
    orders = {tuple(int(row.token_ids[0]) for row in split_updates(groups, 1, seed=(0, step))[0]) for step in range(5)}
    assert len(orders) == 5
    assert tuple(range(32)) not in orders


def test_split_refuses_more_updates_than_groups():
    with pytest.raises(ValueError, match=r"train\.updates_per_step"):
        split_updates([[], []], 3, seed=0)


def padded(batch: list[int], lengths: list[int]) -> int:
    return len(batch) * max((lengths[row] for row in batch), default=0)


@given(
    lengths=st.lists(st.integers(1, 200), max_size=60),
    ranks=st.integers(1, 5),
    budget=st.integers(1, 1500),
)
def test_plan_properties(lengths, ranks, budget):
    plan = plan_micro_batches(lengths, ranks=ranks, budget_tokens=budget)
    batches = [batch for share in plan for batch in share]
    costs = [padded(batch, lengths) for batch in batches]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1
    assert len(plan[0]) >= 1
    assert all(cost <= budget or len(batch) == 1 for batch, cost in zip(batches, costs, strict=True))
    # every rank has work where there is enough, and no rank has more than one micro-batch too much
    if len(lengths) >= ranks:
        assert all(any(share) for share in plan)
    loads = [sum(padded(batch, lengths) for batch in share) for share in plan]
    assert max(loads) - min(loads) <= max(costs) - min(costs)
    assert plan == plan_micro_batches(lengths, ranks=ranks, budget_tokens=budget)


def test_plan_of_equal_rows_by_hand():
    # 8 rows of 10 tokens, 2 ranks, 40 tokens: the fewest micro-batches are two of four rows, one a rank
    assert plan_micro_batches([10] * 8, ranks=2, budget_tokens=40) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    # with room for all in one micro-batch, the second rank still gets half of the work
    assert plan_micro_batches([10] * 8, ranks=2, budget_tokens=999) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_plan_by_hand_evens_out_the_micro_batches():
    # 70 tokens would hold seven of the eight rows and leave one to the second rank
    assert plan_micro_batches([10] * 8, ranks=2, budget_tokens=70) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_plan_by_hand_gives_the_longer_to_the_less_loaded():
    # a budget of 1 makes single rows; round one: 9 | 7, round two: the 5 goes to the 7: 10 | 12, not 14 | 8
    assert plan_micro_batches([9, 7, 5, 1], ranks=2, budget_tokens=1) == [[[0], [3]], [[1], [2]]]


def test_plan_by_hand_takes_another_pass_where_it_saves_more_padding():
    # one pass: 24 rows * 100 = 2400; two: 4 * 100 + 20 * 10 = 600 and one more pass of 128; three: no gain
    plan = plan_micro_batches([100] * 4 + [10] * 20, ranks=1, budget_tokens=9999)
    assert plan == [[list(range(4)), list(range(4, 24))]]
    # 5 rows * 20 = 100 in one pass; two would pad 20 + 4 * 10 = 60: 40 tokens saved are not worth 128
    assert plan_micro_batches([20] + [10] * 4, ranks=1, budget_tokens=9999) == [[list(range(5))]]


def test_plan_by_hand_where_rows_are_few():
    assert plan_micro_batches([7], ranks=2, budget_tokens=5) == [[[0]], [[]]]
    assert plan_micro_batches([], ranks=2, budget_tokens=5) == [[[]], [[]]]
    # one long row and three short ones on four ranks: short ones are split off rather than left together
    assert plan_micro_batches([9, 1, 1, 1], ranks=4, budget_tokens=99) == [[[0]], [[1]], [[2]], [[3]]]


def test_plan_wastes_little_padding_and_is_balanced():
    lengths = np.random.default_rng(0).integers(20, 180, 512).tolist()
    plan = plan_micro_batches(lengths, ranks=2, budget_tokens=4096)
    loads = [sum(padded(batch, lengths) for batch in share) for share in plan]
    assert sum(lengths) / sum(loads) > 0.93
    assert max(loads) / min(loads) < 1.01
    unsorted = sum(padded(list(range(start, start + 32)), lengths) for start in range(0, 512, 32))
    assert sum(lengths) / unsorted < 0.7  # what the sorting is for


@pytest.mark.parametrize(("lengths", "ranks", "budget"), [([1], 0, 1), ([1], 1, 0), ([0, 1], 1, 1)])
def test_plan_refuses_bad_input(lengths, ranks, budget):
    with pytest.raises(ValueError, match="expected ranks"):
        plan_micro_batches(lengths, ranks=ranks, budget_tokens=budget)
