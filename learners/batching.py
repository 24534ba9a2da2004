"""From trajectories to the tensors of one forward pass.

trajectory groups -> rows with advantages -> one part per optimizer update -> micro-batches of every rank.
All of it is deterministic, so every rank computes the same plan and takes its own share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from learners.advantages import group_advantages
from learners.tree_advantages import tree_advantages
from rlsys.types import BoolArray, Demonstration, Float32Array, Int32Array, TrajectoryGroup

Span = tuple[int, int]  # [start, stop) of the rows in descending order of length

# Fixed cost of a forward and backward pass, in tokens: measured as 45 for the tiny model on one CPU thread
# (2.5 ms at 18,000 tokens/s), with a margin for what the engine adds.
PASS_OVERHEAD_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training sequence.

    token_ids: [T] int32, T >= 1.
    loss_mask: [T] bool, True on tokens that may be trained. Token 0 has no prediction and is never trained.
    behavior_logprobs: [T] float32, nats; what the sampler gave each token, 0 for supervised rows.
    advantages: [T] float32, of every trained token; 1.0 for supervised rows.
    """

    token_ids: Int32Array
    loss_mask: BoolArray
    behavior_logprobs: Float32Array
    advantages: Float32Array

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def loss_tokens(self) -> int:
        """Number of targets that `collate` makes of this row: what a loss denominator must count."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Tensors of one forward pass: B rows, right-padded to L tokens; N targets are trained.

    Target column s is token s + 1, predicted by the logits at position s. No attention mask is needed:
    padding stands on the right, where causal attention never looks back from.

    input_ids: [B, L] int64.
    loss_mask: [B, L-1] bool, True where the target is trained.
    behavior_logprobs: [B, L-1] float32, of the targets.
    advantages: [N] float32, of the trained targets in row-major order.
    row_ids: [N] int64, the row of every trained target.
    first_target: smallest column trained in any row (L - 2 if none is). `logits_to_keep = L - first_target`
        gives all logits that are needed; the last of them predicts past the end.
    """

    input_ids: Tensor
    loss_mask: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    row_ids: Tensor
    first_target: int


def rows_from_groups(groups: Sequence[TrajectoryGroup], *, use_std: bool) -> list[list[Row]]:
    """Rows of every group with their advantages, one list a group, in order.

    Trajectories whose reward could not be computed (outcome "error" or "timeout") are left out, of the
    baseline and of every count. A group of which nothing is left gives an empty list.
    """
    return [_searched_rows(group, use_std) if group.searched else _sampled_rows(group, use_std) for group in groups]


def _sampled_rows(group: TrajectoryGroup, use_std: bool) -> list[Row]:
    """A row for every judged trajectory; all of its tokens have the advantage of the trajectory."""
    valid = np.array([trajectory.judged for trajectory in group.trajectories])
    rewards = np.array([trajectory.reward for trajectory in group.trajectories], dtype=np.float64)
    advantages = group_advantages(rewards, valid, estimator="grpo" if use_std else "dr_grpo")
    return [
        Row(
            token_ids=trajectory.token_ids,
            loss_mask=trajectory.loss_mask,
            behavior_logprobs=trajectory.behavior_logprobs,
            advantages=np.full(len(trajectory.token_ids), advantage, dtype=np.float32),
        )
        for trajectory, advantage, keep in zip(group.trajectories, advantages, valid, strict=True)
        if keep
    ]


def _searched_rows(group: TrajectoryGroup, use_std: bool) -> list[Row]:
    """Every thought node is trained once, with its own advantage, as often as it was drawn.

    The first judged trajectory that holds a node trains it; in later ones it is context only. Tokens of no node, and
    those that the policy did not choose, are not trained. A trajectory in which nothing is left to train gives no row.

    A node that was drawn s times stands for s samples of the policy, so its advantage is multiplied by s, over the
    mean of s over all trained tokens of the group: the tokens of a group keep their weight beside other groups.
    """
    advantages = tree_advantages(group.trajectories, estimator="sibling_mean", use_std=use_std)
    trained: set[int] = set()
    rows: list[Row] = []
    draws: list[Float32Array] = []
    for trajectory in group.trajectories:
        if not trajectory.judged:
            continue
        loss_mask = np.zeros(len(trajectory.token_ids), dtype=np.bool_)
        per_token, drawn = np.zeros((2, len(trajectory.token_ids)), dtype=np.float32)
        for step in trajectory.steps:
            if step.node not in trained:
                trained.add(step.node)
                tokens = slice(step.start, step.stop)
                loss_mask[tokens] = trajectory.loss_mask[tokens]
                node = advantages[step.node]
                per_token[tokens] = node.advantage * node.draws
                drawn[tokens] = node.draws
        row = Row(
            token_ids=trajectory.token_ids,
            loss_mask=loss_mask,
            behavior_logprobs=trajectory.behavior_logprobs,
            advantages=per_token,
        )
        if row.loss_tokens:
            rows.append(row)
            draws.append(drawn[1:][loss_mask[1:]])
    mean = np.concatenate(draws).mean(dtype=np.float64) if draws else 1.0
    return [replace(row, advantages=(row.advantages / mean).astype(np.float32)) for row in rows]


def rows_from_demonstrations(demonstrations: Sequence[Demonstration]) -> list[Row]:
    """Supervised rows: advantage 1.0, no behavior policy."""
    return [
        Row(
            token_ids=demonstration.token_ids,
            loss_mask=demonstration.loss_mask,
            behavior_logprobs=np.zeros(len(demonstration.token_ids), dtype=np.float32),
            advantages=np.ones(len(demonstration.token_ids), dtype=np.float32),
        )
        for demonstration in demonstrations
    ]


def split_updates(row_groups: Sequence[Sequence[Row]], updates: int, *, seed: int | Sequence[int]) -> list[list[Row]]:
    """Deal whole groups to the optimizer updates of one training step.

    Groups are shuffled, so that neighbours in the prompt stream do not always share an update, and stay
    whole, so that the advantages of an update are centred. Parts differ by at most one group.

    Args:
        updates: number of parts, 1 <= updates <= number of groups.
        seed: of the shuffle; the same seed gives the same parts.
    """
    if not 1 <= updates <= len(row_groups):
        raise ValueError(
            f"expected 1 to {len(row_groups)} updates for {len(row_groups)} groups, found {updates}; "
            "lower train.updates_per_step or raise train.groups_per_step"
        )
    order = np.random.default_rng(seed).permutation(len(row_groups))
    return [[row for group in part for row in row_groups[group]] for part in np.array_split(order, updates)]


def plan_micro_batches(lengths: Sequence[int], *, ranks: int, budget_tokens: int) -> list[list[list[int]]]:
    """Which rank runs which rows together.

    Rows are sorted by length and cut into K * ranks micro-batches. Of the cuts for one K the one with the
    smallest largest micro-batch is taken, so that they are nearly equal. K is at least what the budget
    demands, and more where that saves more padding than the extra passes cost. All ranks run the same
    number of passes: where a cut makes too few, the largest are halved, and when only single rows are left,
    empty ones are added.

    Args:
        lengths: tokens of every row, each >= 1.
        ranks: R, >= 1.
        budget_tokens: largest rows * longest row of one micro-batch. A longer row gets one of its own.

    Returns:
        [R][K] lists of row indices, K >= 1; every row is in exactly one. Padded tokens of two ranks differ
        by no more than those of two micro-batches do. The k-th micro-batches of all ranks are similar in
        size, which matters where ranks meet in every pass (ZeRO 3).
    """
    if ranks < 1 or budget_tokens < 1 or min(lengths, default=1) < 1:
        raise ValueError(f"expected ranks, budget_tokens and lengths >= 1, found {ranks}, {budget_tokens}, {lengths}")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    descending = [lengths[row] for row in order]
    fewest = max(1, -(-len(_cut(descending, budget_tokens)) // ranks))
    candidates = range(fewest, 4 * fewest + 1, max(1, fewest // 4))
    plans = [_plan(descending, ranks, passes, budget_tokens) for passes in candidates]
    best = min(plans, key=lambda shares: _slowest(shares, descending))
    return [[order[start:stop] for start, stop in share] for share in best]


def _plan(descending: Sequence[int], ranks: int, passes: int, budget: int) -> list[list[Span]]:
    """The shares of the ranks with `passes` micro-batches each."""
    spans = _cut(descending, _smallest_budget(descending, passes * ranks, budget))
    return _deal(_fill_up(spans, passes * ranks, descending), ranks, descending)


def _slowest(shares: Sequence[Sequence[Span]], descending: Sequence[int]) -> int:
    """Cost of the rank with most work, in tokens."""
    return max(sum(_padded_tokens(span, descending) + PASS_OVERHEAD_TOKENS for span in share) for share in shares)


def _padded_tokens(span: Span, descending: Sequence[int]) -> int:
    start, stop = span
    return (stop - start) * descending[start] if stop > start else 0


def _cut(descending: Sequence[int], budget: int) -> list[Span]:
    """Consecutive spans, each as wide as the budget allows and at least one row wide."""
    spans, start = [], 0
    while start < len(descending):
        stop = min(len(descending), start + max(1, budget // descending[start]))
        spans.append((start, stop))
        start = stop
    return spans


def _smallest_budget(descending: Sequence[int], count: int, budget: int) -> int:
    """The least budget up to `budget` with which `_cut` makes at most `count` spans (bisection)."""
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(descending, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return high


def _fill_up(spans: list[Span], count: int, descending: Sequence[int]) -> list[Span]:
    """Halve the largest spans until there are `count`; add empty ones where only single rows are left."""
    spans = list(spans)
    while len(spans) < count:
        divisible = [span for span in spans if span[1] - span[0] > 1]
        if not divisible:
            return spans + [(0, 0)] * (count - len(spans))
        start, stop = max(divisible, key=lambda span: _padded_tokens(span, descending))
        middle = (start + stop) // 2
        spans.remove((start, stop))
        spans += [(start, middle), (middle, stop)]
    return spans


def _deal(spans: Sequence[Span], ranks: int, descending: Sequence[int]) -> list[list[Span]]:
    """Give every rank one span a round, largest spans first, the largest of a round to the least loaded."""
    ordered = sorted(spans, key=lambda span: (-_padded_tokens(span, descending), span))
    shares: list[list[Span]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for start in range(0, len(ordered), ranks):
        by_load = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for rank, span in zip(by_load, ordered[start : start + ranks], strict=True):
            shares[rank].append(span)
            loads[rank] += _padded_tokens(span, descending)
    return shares


def collate(rows: Sequence[Row], pad_id: int) -> MicroBatch:
    """Pad rows to one length and shift everything that belongs to targets.

    An empty micro-batch becomes one row of padding that trains nothing, because every rank must run the
    same number of forward and backward passes.
    """
    width = max([2, *(row.length for row in rows)])
    height = max(1, len(rows))
    input_ids = np.full((height, width), pad_id, dtype=np.int64)
    loss_mask = np.zeros((height, width), dtype=np.bool_)
    behavior_logprobs = np.zeros((height, width), dtype=np.float32)
    advantages = np.zeros((height, width), dtype=np.float32)
    for index, row in enumerate(rows):
        input_ids[index, : row.length] = row.token_ids
        loss_mask[index, : row.length] = row.loss_mask
        behavior_logprobs[index, : row.length] = row.behavior_logprobs
        advantages[index, : row.length] = row.advantages
    targets = loss_mask[:, 1:]
    row_ids, columns = np.nonzero(targets)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        loss_mask=torch.from_numpy(targets.copy()),
        behavior_logprobs=torch.from_numpy(behavior_logprobs[:, 1:].copy()),
        advantages=torch.from_numpy(advantages[:, 1:][targets]),
        row_ids=torch.from_numpy(row_ids),
        first_target=int(columns.min(initial=width - 2)),
    )
