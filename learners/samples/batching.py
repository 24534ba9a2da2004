"""From training rows to the tensors of one forward pass.

Units of an optimizer update -> micro-batches of every rank -> padded tensors, with the targets of every term of the
loss. All of it is deterministic, so every rank computes the same plan and takes its own share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from learners.samples.types import Pair, PolicyTokens, Row, Unit
from rlsys.types import BoolArray, Float32Array

Item = TypeVar("Item")
Part = TypeVar("Part")
Span = tuple[int, int]  # [start, stop) of the units in descending order of length

# Fixed cost of a forward and backward pass, in tokens: measured as 45 for the tiny model on one CPU thread
# (2.5 ms at 18,000 tokens/s), with a margin for what the engine adds.
PASS_OVERHEAD_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTargets:
    """Targets of the policy term, M of them, and of the critic; values: see `learners.samples.types.PolicyTokens`.

    at: [M] int64, their places among the N targets of the micro-batch. row_ids: [M] int64, the row of each.
    behavior_logprobs, advantages, weights: [M] float32. The others: [M] float32, or None where no row has them.
    """

    at: Tensor
    row_ids: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    values: Tensor | None
    returns: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SftTargets:
    """Targets of the supervised term. at: [M] int64, their places among the N targets. weights: [M] float32."""

    at: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTargets:
    """Targets of the P pairs of a micro-batch.

    at: [M] int64, their places among the N targets. segments: [M] int64, 2p of the chosen side of pair p, 2p + 1 of
    the rejected. reference: [2P] float64 scores under the reference policy. smoothing, weights: [P] float64.
    """

    at: Tensor
    segments: Tensor
    reference: Tensor
    smoothing: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Tensors of one forward pass: B rows, right-padded to L tokens; N targets are trained by one term or several.

    Target column s is token s + 1, predicted by the logits at position s. No attention mask is needed:
    padding stands on the right, where causal attention never looks back from.

    input_ids: [B, L] int64.
    loss_mask: [B, L-1] bool, True where the target is trained; the N targets are numbered in row-major order.
    first_target: smallest column trained in any row (L - 2 if none is). `logits_to_keep = L - first_target`
        gives all logits that are needed; the last of them predicts past the end.
    real_tokens: of the rows, without padding.
    policy, sft, pairs: the targets of the terms; None where no row is for one.
    """

    input_ids: Tensor
    loss_mask: Tensor
    first_target: int
    real_tokens: int
    policy: PolicyTargets | None
    sft: SftTargets | None
    pairs: PairTargets | None

    @property
    def targets(self) -> int:
        """N."""
        return int(self.loss_mask.sum())


def split_updates(items: Sequence[Item], updates: int, *, seed: int | Sequence[int]) -> list[list[Item]]:
    """Deal items, such as the units of whole groups, to the optimizer updates of one training step.

    They are shuffled, so that neighbours in the prompt stream do not always share an update. Parts differ by at most
    one item, and are empty where there are fewer items than updates.

    Args:
        updates: number of parts, >= 1.
        seed: of the shuffle; the same seed gives the same parts.
    """
    if updates < 1:
        raise ValueError(f"expected train.updates_per_step >= 1, found {updates}")
    order = np.random.default_rng(seed).permutation(len(items))
    return [[items[number] for number in part] for part in np.array_split(order, updates)]


@dataclass(frozen=True, slots=True)
class _Ordered:
    """Units in descending order of length. before: rows of all units before the n-th; one entry more at the end."""

    lengths: Sequence[int]
    before: Sequence[int]

    def padded_tokens(self, span: Span) -> int:
        start, stop = span
        return (self.before[stop] - self.before[start]) * self.lengths[start] if stop > start else 0


def plan_micro_batches(
    lengths: Sequence[int], *, ranks: int, budget_tokens: int, heights: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Which rank runs which units together.

    Units are sorted by length and cut into K * ranks micro-batches. Of the cuts for one K the one with the
    smallest largest micro-batch is taken, so that they are nearly equal. K is at least what the budget
    demands, and more where that saves more padding than the extra passes cost. All ranks run the same
    number of passes: where a cut makes too few, the largest are halved, and when only single units are left,
    empty ones are added.

    Args:
        lengths: tokens of the longest row of every unit, each >= 1.
        ranks: R, >= 1.
        budget_tokens: largest rows * longest row of one micro-batch. A larger unit gets one of its own.
        heights: rows of every unit, each >= 1; one by default.

    Returns:
        [R][K] lists of indices of units, K >= 1; every unit is in exactly one. Padded tokens of two ranks differ
        by no more than those of two micro-batches do. The k-th micro-batches of all ranks are similar in
        size, which matters where ranks meet in every pass (ZeRO 3).
    """
    if ranks < 1 or budget_tokens < 1 or min(lengths, default=1) < 1:
        raise ValueError(f"expected ranks, budget_tokens and lengths >= 1, found {ranks}, {budget_tokens}, {lengths}")
    heights = heights or [1] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda unit: (-lengths[unit], unit))
    units = _Ordered([lengths[unit] for unit in order], [0, *accumulate(heights[unit] for unit in order)])
    fewest = max(1, -(-len(_cut(units, budget_tokens)) // ranks))
    candidates = range(fewest, 4 * fewest + 1, max(1, fewest // 4))
    plans = [_plan(units, ranks, passes, budget_tokens) for passes in candidates]
    best = min(plans, key=lambda shares: _slowest(shares, units))
    return [[order[start:stop] for start, stop in share] for share in best]


def _plan(units: _Ordered, ranks: int, passes: int, budget: int) -> list[list[Span]]:
    """The shares of the ranks with `passes` micro-batches each."""
    spans = _cut(units, _smallest_budget(units, passes * ranks, budget))
    return _deal(_fill_up(spans, passes * ranks, units), ranks, units)


def _slowest(shares: Sequence[Sequence[Span]], units: _Ordered) -> int:
    """Cost of the rank with most work, in tokens."""
    return max(sum(units.padded_tokens(span) + PASS_OVERHEAD_TOKENS for span in share) for share in shares)


def _cut(units: _Ordered, budget: int) -> list[Span]:
    """Consecutive spans, each as wide as the budget allows and at least one unit wide."""
    spans, start = [], 0
    while start < len(units.lengths):
        rows = units.before[start] + budget // units.lengths[start]
        stop = max(start + 1, bisect_right(units.before, rows, lo=start) - 1)
        spans.append((start, stop))
        start = stop
    return spans


def _smallest_budget(units: _Ordered, count: int, budget: int) -> int:
    """The least budget up to `budget` with which `_cut` makes at most `count` spans (bisection)."""
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(units, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return high


def _fill_up(spans: list[Span], count: int, units: _Ordered) -> list[Span]:
    """Halve the largest spans until there are `count`; add empty ones where only single units are left."""
    spans = list(spans)
    while len(spans) < count:
        divisible = [span for span in spans if span[1] - span[0] > 1]
        if not divisible:
            return spans + [(0, 0)] * (count - len(spans))
        start, stop = max(divisible, key=units.padded_tokens)
        middle = (start + stop) // 2
        spans.remove((start, stop))
        spans += [(start, middle), (middle, stop)]
    return spans


def _deal(spans: Sequence[Span], ranks: int, units: _Ordered) -> list[list[Span]]:
    """Give every rank one span a round, largest spans first, the largest of a round to the least loaded."""
    ordered = sorted(spans, key=lambda span: (-units.padded_tokens(span), span))
    shares: list[list[Span]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for start in range(0, len(ordered), ranks):
        by_load = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for rank, span in zip(by_load, ordered[start : start + ranks], strict=True):
            shares[rank].append(span)
            loads[rank] += units.padded_tokens(span)
    return shares


def collate(units: Sequence[Unit], pad_id: int) -> MicroBatch:
    """Pad rows to one length and shift everything that belongs to targets.

    An empty micro-batch becomes one row of padding that trains nothing, because every rank must run the
    same number of forward and backward passes.
    """
    rows = [row for unit in units for row in unit.rows]
    width = max([2, *(row.length for row in rows)])
    input_ids = np.full((max(1, len(rows)), width), pad_id, dtype=np.int64)
    masks = np.zeros((max(1, len(rows)), width), dtype=np.bool_)
    for index, row in enumerate(rows):
        input_ids[index, : row.length] = row.token_ids
        masks[index, : row.length] = row.targets
    targets = masks[:, 1:]
    numbers = np.cumsum(targets).reshape(targets.shape) - 1

    def places(mask_of: Callable[[Row], BoolArray | None]) -> list[np.ndarray]:
        """[rows] of the places of a term's targets among all; those of a row that it does not train are none."""
        masks = [mask_of(row) for row in rows]
        return [
            _NONE if mask is None else numbers[index, : len(mask) - 1][mask[1:]] for index, mask in enumerate(masks)
        ]

    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        loss_mask=torch.from_numpy(targets.copy()),
        first_target=int(np.nonzero(targets)[1].min(initial=width - 2)),
        real_tokens=sum(row.length for row in rows),
        policy=_policy_targets(rows, places(lambda row: row.policy_mask)),
        sft=_sft_targets(rows, places(lambda row: row.sft_mask)),
        pairs=_pair_targets(
            [unit.pair for unit in units if unit.pair],
            [
                found
                for row, found in zip(rows, places(lambda row: row.preference_mask), strict=True)
                if row.preference_mask is not None
            ],
        ),
    )


_NONE = np.zeros(0, dtype=np.int64)


def _policy_targets(rows: Sequence[Row], places: Sequence[np.ndarray]) -> PolicyTargets | None:
    trained = [(index, row.policy) for index, row in enumerate(rows) if row.policy is not None]
    if not trained:
        return None
    counts = [len(places[index]) for index, _ in trained]

    def gather(values_of: Callable[[PolicyTokens], Float32Array | None]) -> Tensor | None:
        found = [(values_of(tokens), tokens.mask) for _, tokens in trained]
        kept = [values[1:][mask[1:]] for values, mask in found if values is not None]
        return torch.from_numpy(np.concatenate(kept).astype(np.float32)) if len(kept) == len(trained) else None

    behavior, advantages = gather(lambda tokens: tokens.behavior_logprobs), gather(lambda tokens: tokens.advantages)
    assert behavior is not None and advantages is not None  # noqa: S101 - every row has them
    return PolicyTargets(
        at=torch.from_numpy(np.concatenate([places[index] for index, _ in trained])),
        row_ids=torch.from_numpy(np.repeat([index for index, _ in trained], counts)),
        behavior_logprobs=behavior,
        advantages=advantages,
        weights=torch.from_numpy(np.repeat([tokens.weight for _, tokens in trained], counts).astype(np.float32)),
        old_logprobs=gather(lambda tokens: tokens.old_logprobs),
        reference_logprobs=gather(lambda tokens: tokens.reference_logprobs),
        values=gather(lambda tokens: tokens.values),
        returns=gather(lambda tokens: tokens.returns),
    )


def _sft_targets(rows: Sequence[Row], places: Sequence[np.ndarray]) -> SftTargets | None:
    if all(row.sft_mask is None for row in rows):
        return None
    weights = np.repeat([row.sft_weight for row in rows], [len(found) for found in places])
    return SftTargets(at=torch.from_numpy(np.concatenate(places)), weights=torch.from_numpy(weights.astype(np.float32)))


def _pair_targets(pairs: Sequence[Pair], places: Sequence[np.ndarray]) -> PairTargets | None:
    """places: of the sides of the pairs in order: chosen, rejected, chosen, ..."""
    if not pairs:
        return None
    return PairTargets(
        at=torch.from_numpy(np.concatenate(places)),
        segments=torch.from_numpy(np.repeat(np.arange(len(places)), [len(found) for found in places])),
        reference=torch.tensor([pair.reference for pair in pairs], dtype=torch.float64).flatten(),
        smoothing=torch.tensor([pair.smoothing for pair in pairs], dtype=torch.float64),
        weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float64),
    )


def moved(part: Part, device: str) -> Part:
    """A dataclass of tensors, with those of dataclasses in it, on a device."""
    found: dict[str, Any] = {}
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.to(device)
        elif hasattr(value, "__dataclass_fields__"):
            found[field.name] = moved(value, device)
    return replace(part, **found)  # type: ignore[type-var]
