"""Splitting into updates, micro-batch plans and the shift to targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_samples import flags, floats, ids, mixed_items, policy_sample, sft_sample

from learners.samples.batching import collate
from learners.samples.planning import plan_micro_batches, split_updates
from learners.samples.types import PackItem, Pair, Sample


def alone(*samples: Sample) -> list[PackItem]:
    return [PackItem(samples=(sample,)) for sample in samples]


def sides(chosen: list[int], rejected: list[int], start: int, *, sft: list[int] | None = None) -> PackItem:
    """Return a pair that is scored from `start` on."""
    samples = [
        Sample(token_ids=ids(*tokens), preference_mask=np.arange(len(tokens)) >= start) for tokens in (chosen, rejected)
    ]
    if sft is not None:
        samples[0] = replace(samples[0], sft_mask=flags(*sft), sft_weight=0.25)
    return PackItem(samples=(samples[0], samples[1]), pair=Pair(reference=(-3.0, -5.0), smoothing=0.1, weight=0.5))


def test_collate_of_policy_rows_by_hand():
    first = policy_sample([5, 6, 7, 8], [0, 0, 1, 1], [9, 9, 2, -2], behavior_logprobs=floats(0, 0, -0.5, -0.25))
    second = policy_sample([9, 6, 7], [0, 0, 1], [0, 0, -1], behavior_logprobs=floats(0, 0, -1.5))
    assert first.policy is not None and second.policy is not None
    first = replace(first, policy=replace(first.policy, weight=0.125))
    second = replace(second, policy=replace(second.policy, weight=0.5))
    batch = collate(alone(first, second), pad_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 6, 7, 3]]
    # The logits at one place predict the next token: 7 and 8 of the first row, 7 of the second.
    assert (batch.targets.tolist(), batch.target_ids.tolist()) == ([1, 2, 4 + 1], [7, 8, 7])
    assert (batch.depths, batch.attention) == (None, None)
    assert batch.real_tokens == 7
    assert batch.policy is not None
    assert batch.policy.positions.tolist() == [0, 1, 2]
    assert batch.policy.row_ids.tolist() == [0, 0, 1]
    assert batch.policy.behavior_logprobs.tolist() == [-0.5, -0.25, -1.5]
    assert batch.policy.advantages.tolist() == [2.0, -2.0, -1.0]
    assert batch.policy.weights.tolist() == [0.125, 0.125, 0.5]
    assert (batch.policy.old_logprobs, batch.policy.reference_logprobs, batch.policy.values) == (None, None, None)
    assert (batch.sft, batch.pairs) == (None, None)
    assert {batch.input_ids.dtype, batch.targets.dtype, batch.target_ids.dtype} == {torch.int64}
    assert (batch.policy.weights.dtype, batch.policy.advantages.dtype) == (torch.float32, torch.float32)


def test_optional_values_are_collated_only_if_every_sample_has_them():
    known = {"old_logprobs": floats(0, -1, -2), "values": floats(0, 0.5, 0.25), "returns": floats(0, 1, 2)}
    sample = policy_sample([5, 6, 7], [0, 1, 1], [0, 1, 1], **known, reference_logprobs=floats(7, -3, -4))
    batch = collate(alone(sample, sample), pad_id=0).policy
    assert batch is not None
    optional = [batch.old_logprobs, batch.reference_logprobs, batch.values, batch.returns]
    assert [None if x is None else x.tolist() for x in optional] == [
        [-1.0, -2.0] * 2,
        [-3.0, -4.0] * 2,
        [0.5, 0.25] * 2,
        [1.0, 2.0] * 2,
    ]
    # A sample of a searched group has no values, so the batch has none.
    mixed = collate(alone(sample, policy_sample([5, 6], [0, 1], [0, 1])), pad_id=0).policy
    assert mixed is not None
    assert (mixed.values, mixed.returns) == (None, None)


def test_collate_of_mixed_items_by_hand():
    # A pair (chosen imitated from its second token on, compared from its third), a demonstration, a policy sample.
    items = [
        sides([5, 6, 7, 8], [5, 6, 9], 2, sft=[0, 1, 1, 1]),
        *alone(
            replace(sft_sample([1, 2, 3], [0, 1, 0]), sft_weight=0.25), policy_sample([4, 4, 4], [0, 0, 1], [0, 0, 1])
        ),
    ]
    batch = collate(items, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0], [1, 2, 3, 0], [4, 4, 4, 0]]
    # Targets in sample-major order: 6 7 8 | 9 | 2 | 4
    assert (batch.targets.tolist(), batch.target_ids.tolist()) == ([0, 1, 2, 5, 8, 13], [6, 7, 8, 9, 2, 4])
    assert batch.policy is not None and batch.sft is not None and batch.pairs is not None
    assert (batch.policy.positions.tolist(), batch.policy.row_ids.tolist()) == ([5], [3])
    assert batch.sft.positions.tolist() == [0, 1, 2, 4]
    assert batch.sft.weights.tolist() == [0.25] * 4
    assert batch.pairs.positions.tolist() == [1, 2, 3]
    assert batch.pairs.segments.tolist() == [0, 0, 1]
    assert batch.pairs.reference.tolist() == [-3.0, -5.0]
    assert (batch.pairs.smoothing.tolist(), batch.pairs.weights.tolist()) == ([0.1], [0.5])


def test_segments_of_pairs_interleave():
    # Samples of other terms between the pairs do not change the segments.
    pairs = [sides([1, 2, 3], [1, 4], 1), sides([5, 6], [5, 7, 8], 1)]
    items = [pairs[0], *alone(sft_sample([9, 9, 9], [0, 1, 1])), pairs[1]]
    batch = collate(items, pad_id=0)
    assert batch.pairs is not None
    # targets: 2 3 | 4 | 9 9 | 6 | 7 8
    assert batch.pairs.positions.tolist() == [0, 1, 2, 5, 6, 7]
    assert batch.pairs.segments.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.target_ids[batch.pairs.positions].tolist() == [2, 3, 4, 6, 7, 8]


def test_the_chosen_side_of_a_pair_may_be_trained_alone():
    # Without a preference term there is one sample and no pair.
    batch = collate(alone(sft_sample([1, 2, 3], [0, 1, 1])), pad_id=0)
    assert batch.sft is not None
    assert (batch.policy, batch.pairs, batch.sft.positions.tolist()) == (None, None, [0, 1])


def test_the_first_token_is_never_a_target():
    # The first token has no prediction, whatever the term.
    samples = [
        policy_sample([5, 6, 7], [1, 0, 1], [1, 1, 1], behavior_logprobs=floats(-1, 0, -2)),
        sft_sample([5, 6, 7], [1, 1, 0]),
    ]
    batch = collate([*alone(*samples), sides([5, 6], [5, 7], 0)], pad_id=0)
    assert batch.targets.tolist() == [1, 3, 6, 9]
    assert batch.policy is not None and batch.sft is not None and batch.pairs is not None
    assert (batch.policy.positions.tolist(), batch.policy.behavior_logprobs.tolist()) == ([0], [-2.0])
    assert (batch.sft.positions.tolist(), batch.pairs.positions.tolist()) == ([1], [2, 3])


def test_nothing_to_train_still_makes_a_batch():
    empty = collate([], pad_id=3)
    assert empty.input_ids.tolist() == [[3, 3]]
    assert (empty.policy, empty.sft, empty.pairs) == (None, None, None)
    assert (len(empty.targets), len(empty.target_ids), empty.real_tokens) == (0, 0, 0)
    single = collate(alone(policy_sample([5], [1], [1])), pad_id=3)
    assert (single.input_ids.tolist(), single.targets.tolist()) == ([[5, 3]], [])
    assert single.policy is not None
    assert (single.policy.positions.tolist(), single.policy.row_ids.tolist()) == ([], [])


def test_a_sample_without_targets_shifts_no_other():
    sample = policy_sample([5, 6], [0, 1], [0, 2])
    batch = collate(alone(policy_sample([7, 8], [0, 0], [1, 1]), sample, sft_sample([7, 8], [0, 0]), sample), pad_id=0)
    assert batch.policy is not None and batch.sft is not None
    assert (batch.policy.positions.tolist(), batch.policy.row_ids.tolist()) == ([0, 1], [1, 3])
    assert batch.sft.positions.tolist() == batch.sft.weights.tolist() == []


def test_only_values_at_targets_are_read():
    nan = np.nan
    sample = policy_sample(
        [5, 6, 7, 8], [0, 1, 0, 1], [nan, 0.5, nan, -0.25], behavior_logprobs=floats(nan, -1, nan, -2)
    )
    batch = collate(alone(sample, policy_sample([5, 6], [0, 1], [nan, 2])), pad_id=0).policy
    assert batch is not None
    assert batch.advantages.tolist() == [0.5, -0.25, 2.0]
    assert batch.behavior_logprobs.tolist() == [-1.0, -2.0, -2.0]


def test_positions_of_every_term_point_at_its_own_tokens():
    # Each term's targets, looked up through `at`, are the tokens under its own mask, sample by sample.
    items = mixed_items()
    samples = [sample for item in items for sample in item.samples]
    batch = collate(items, pad_id=0)
    targets = batch.target_ids
    assert batch.policy is not None and batch.sft is not None and batch.pairs is not None
    for at, masks in (
        (batch.policy.positions, [sample.policy_mask for sample in samples]),
        (batch.sft.positions, [sample.sft_mask for sample in samples]),
        (batch.pairs.positions, [sample.preference_mask for sample in samples]),
    ):
        expected = [
            sample.token_ids[1:][mask[1:]] for sample, mask in zip(samples, masks, strict=True) if mask is not None
        ]
        assert targets[at].tolist() == np.concatenate(expected).tolist()


# --- parts ---


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=20), updates=st.integers(1, 25), seed=st.integers(0, 99))
def test_split_deals_everything_evenly(sizes, updates, seed):
    groups = [[(number, member) for member in range(size)] for number, size in enumerate(sizes)]
    parts = split_updates(groups, updates, seed=seed)
    assert len(parts) == updates
    assert sorted(map(id, (group for part in parts for group in part))) == sorted(map(id, groups))
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1  # empty ones where there are more updates than groups
    assert split_updates(groups, updates, seed=seed) == parts


def test_split_shuffles_by_its_seed():
    orders = {tuple(split_updates(range(32), 1, seed=(0, step))[0]) for step in range(5)}
    assert len(orders) == 5
    assert tuple(range(32)) not in orders


def test_split_refuses_no_updates():
    with pytest.raises(ValueError, match=r"train\.updates_per_step"):
        split_updates([[], []], 0, seed=0)


# --- plans ---


def padded(batch: list[int], lengths: list[int], heights: list[int] | None = None) -> int:
    samples = len(batch) if heights is None else sum(heights[item] for item in batch)
    return samples * max((lengths[sample] for sample in batch), default=0)


@given(
    items=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 2)), max_size=60),
    ranks=st.integers(1, 5),
    budget=st.integers(1, 1500),
)
def test_plan_properties(items, ranks, budget):
    lengths, heights = [length for length, _ in items], [height for _, height in items]
    plan = plan_micro_batches(lengths, ranks=ranks, budget_tokens=budget, sample_counts=heights)
    batches = [batch for share in plan for batch in share]
    costs = [padded(batch, lengths, heights) for batch in batches]
    assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1
    assert len(plan[0]) >= 1
    assert all(cost <= budget or len(batch) == 1 for batch, cost in zip(batches, costs, strict=True))
    # every rank has work where there is enough, and no rank has more than one micro-batch too much
    if len(lengths) >= ranks:
        assert all(any(share) for share in plan)
    loads = [sum(padded(batch, lengths, heights) for batch in share) for share in plan]
    assert max(loads) - min(loads) <= max(costs) - min(costs)
    assert plan == plan_micro_batches(lengths, ranks=ranks, budget_tokens=budget, sample_counts=heights)


def test_plan_counts_the_rows_of_pairs():
    # 4 pairs of 10 tokens in 40: two pairs a pass, not four.
    assert plan_micro_batches([10] * 4, ranks=1, budget_tokens=40, sample_counts=[2] * 4) == [[[0, 1], [2, 3]]]
    assert plan_micro_batches([10] * 4, ranks=1, budget_tokens=40) == [[[0, 1, 2, 3]]]
    # A pair beside two single samples: 4 samples of 10 in a budget of 40, on two ranks two samples each.
    assert plan_micro_batches([10] * 3, ranks=2, budget_tokens=40, sample_counts=[2, 1, 1]) == [[[0]], [[1, 2]]]


def test_plan_of_equal_rows_by_hand():
    # 8 samples of 10 tokens, 2 ranks, 40 tokens: the fewest micro-batches are two of four samples, one a rank
    assert plan_micro_batches([10] * 8, ranks=2, budget_tokens=40) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    # with room for all in one micro-batch, the second rank still gets half of the work
    assert plan_micro_batches([10] * 8, ranks=2, budget_tokens=999) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_plan_by_hand_evens_out_the_micro_batches():
    # 70 tokens would hold seven of the eight samples and leave one to the second rank
    assert plan_micro_batches([10] * 8, ranks=2, budget_tokens=70) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_plan_by_hand_gives_the_longer_to_the_less_loaded():
    # a budget of 1 makes single samples; round one: 9 | 7, round two: the 5 goes to the 7: 10 | 12, not 14 | 8
    assert plan_micro_batches([9, 7, 5, 1], ranks=2, budget_tokens=1) == [[[0], [3]], [[1], [2]]]


def test_plan_by_hand_takes_another_pass_where_it_saves_more_padding():
    # one pass: 24 samples * 100 = 2400; two: 4 * 100 + 20 * 10 = 600 and one more pass of 128; three: no gain
    plan = plan_micro_batches([100] * 4 + [10] * 20, ranks=1, budget_tokens=9999)
    assert plan == [[list(range(4)), list(range(4, 24))]]
    # 5 samples * 20 = 100 in one pass; two would pad 20 + 4 * 10 = 60: 40 tokens saved are not worth 128
    assert plan_micro_batches([20] + [10] * 4, ranks=1, budget_tokens=9999) == [[list(range(5))]]


def test_plan_by_hand_where_rows_are_few():
    assert plan_micro_batches([7], ranks=2, budget_tokens=5) == [[[0]], [[]]]
    assert plan_micro_batches([], ranks=2, budget_tokens=5) == [[[]], [[]]]
    # one long sample and three short ones on four ranks: short ones are split off rather than left together
    assert plan_micro_batches([9, 1, 1, 1], ranks=4, budget_tokens=99) == [[[0]], [[1]], [[2]], [[3]]]


def test_plan_wastes_little_padding_and_is_balanced():
    lengths = np.random.default_rng(0).integers(20, 180, 512).tolist()
    plan = plan_micro_batches(lengths, ranks=2, budget_tokens=4096)
    loads = [sum(padded(batch, lengths) for batch in share) for share in plan]
    assert sum(lengths) / sum(loads) > 0.93
    assert max(loads) / min(loads) < 1.01
    unsorted = sum(padded(list(range(start, start + 32)), lengths) for start in range(0, 512, 32))
    assert sum(lengths) / unsorted < 0.7  # without sorting


@pytest.mark.parametrize(("lengths", "ranks", "budget"), [([1], 0, 1), ([1], 1, 0), ([0, 1], 1, 1)])
def test_plan_refuses_bad_input(lengths, ranks, budget):
    with pytest.raises(ValueError, match="expected ranks"):
        plan_micro_batches(lengths, ranks=ranks, budget_tokens=budget)
