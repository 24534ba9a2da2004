"""Conversion of training samples to the tensors of one forward pass.

The items of an optimizer update are assigned to micro-batches of all ranks. Each micro-batch becomes padded tensors
with the targets of every term of the loss. The plan is deterministic, so every rank computes the same plan and takes
its own share.
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

from learners.samples.packing import RowAttention, pack, pad_rows
from learners.samples.types import PackItem, Pair, PolicyTokens, Sample
from rlsys.types import BoolArray, Float32Array

Entry = TypeVar("Entry")
Tensors = TypeVar("Tensors")
Span = tuple[int, int]  # range [start, stop) of items that are sorted by descending length

# Fixed cost of a forward and backward pass, in tokens. Measured as 45 for the tiny model on one CPU thread
# (2.5 ms at 18,000 tokens/s). The rest is a margin for the overhead of the engine.
PASS_OVERHEAD_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTargets:
    """M targets of the policy term and the critic.

    The other attributes are [M] float32 tensors; see `learners.samples.types.PolicyTokens`. An optional tensor is None
    if any sample lacks its values.

    Attributes:
        positions: [M] int64, indices into the N targets of the micro-batch.
        row_ids: [M] int64, row of each target.
    """

    positions: Tensor
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
    """M targets of the supervised term.

    Attributes:
        positions: [M] int64, indices into the N targets of the micro-batch.
        weights: [M] float32.
    """

    positions: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTargets:
    """M targets of the P pairs of a micro-batch.

    Attributes:
        positions: [M] int64, indices into the N targets of the micro-batch.
        segments: [M] int64, 2p for the chosen side of pair p and 2p + 1 for the rejected side.
        reference: [2P] float64, scores under the reference policy.
        smoothing: [P] float64, label smoothing.
        weights: [P] float64.
    """

    positions: Tensor
    segments: Tensor
    reference: Tensor
    smoothing: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Tensors of one forward pass: B rows, right-padded to L tokens, with N targets.

    A row holds one sample, or several that share their beginnings. A target may be trained by several terms. Rows of
    one sample need no mask, because causal attention never looks to the padding on the right.

    Attributes:
        input_ids: [B, L] int64.
        depths: [B, L] int64, positions of the tokens in their samples; None if every row holds one sample.
        attention: the attention of the rows; None if every row holds one sample.
        targets: [N] int64, places in the flattened input_ids whose logits predict a target, by sample and token.
        target_ids: [N] int64, the tokens to predict.
        parts: number of parts in which the logits of the targets are computed.
        real_tokens: number of tokens without padding.
        policy: targets of the policy term and the critic; None if no sample has any.
        sft: targets of the supervised term; None if no sample has any.
        pairs: targets of the preference term; None if there is no pair.
    """

    input_ids: Tensor
    depths: Tensor | None
    attention: RowAttention | None
    targets: Tensor
    target_ids: Tensor
    parts: int
    real_tokens: int
    policy: PolicyTargets | None
    sft: SftTargets | None
    pairs: PairTargets | None

    def count(self, term: str) -> int:
        """Return the number of targets of a term; for the term preference, of pairs."""
        if term == "preference":
            return len(self.pairs.weights) if self.pairs else 0
        targets = self.sft if term == "sft" else self.policy
        return len(targets.positions) if targets else 0


def split_updates(entries: Sequence[Entry], updates: int, *, seed: int | Sequence[int]) -> list[list[Entry]]:
    """Shuffle entries and deal them to the optimizer updates of one training step.

    Without the shuffle, neighbours in the prompt stream would always share an update.

    Args:
        entries: entries to deal, such as the list of items of each group.
        updates: number of updates, >= 1.
        seed: seed of the shuffle; the same seed gives the same parts.

    Returns:
        One list per update. Their sizes differ by at most one; some are empty if there are fewer entries than updates.

    Raises:
        ValueError: updates < 1.
    """
    if updates < 1:
        raise ValueError(f"expected train.updates_per_step >= 1, found {updates}")
    order = np.random.default_rng(seed).permutation(len(entries))
    return [[entries[number] for number in part] for part in np.array_split(order, updates)]


@dataclass(frozen=True, slots=True)
class _Ordered:
    """Items in descending order of length. `samples_before[n]` counts the samples of the first n items."""

    lengths: Sequence[int]
    samples_before: Sequence[int]

    def padded_tokens(self, span: Span) -> int:
        start, stop = span
        return (self.samples_before[stop] - self.samples_before[start]) * self.lengths[start] if stop > start else 0


def plan_micro_batches(
    lengths: Sequence[int], *, ranks: int, budget_tokens: int, sample_counts: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Assign items to the micro-batches of all ranks.

    Items are sorted by length and cut into K * ranks micro-batches. For each K, the plan uses the cut whose largest
    micro-batch is smallest, so that micro-batches are nearly equal. K is at least the number that the budget demands.
    It is larger if that saves more padding than the extra passes cost. All ranks run the same number of passes: if a
    cut gives too few micro-batches, the largest are halved. If only single items are left, empty micro-batches are
    added.

    Args:
        lengths: tokens of the longest sample of every item, each >= 1.
        ranks: R, >= 1.
        budget_tokens: upper bound on samples * longest sample of a micro-batch. An item above the bound gets a
            micro-batch for itself.
        sample_counts: number of samples of every item, each >= 1; None for 1 each.

    Returns:
        [R][K] lists of item indices, K >= 1; every item is in exactly one list. The padded tokens of two ranks differ
        by at most the difference between two micro-batches. The k-th micro-batches of all ranks are similar in size.
        This matters if ranks synchronise in every pass (ZeRO 3).

    Raises:
        ValueError: ranks, budget_tokens or a length is below 1.
    """
    if ranks < 1 or budget_tokens < 1 or min(lengths, default=1) < 1:
        raise ValueError(f"expected ranks, budget_tokens and lengths >= 1, found {ranks}, {budget_tokens}, {lengths}")
    sample_counts = sample_counts or [1] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    items = _Ordered([lengths[item] for item in order], [0, *accumulate(sample_counts[item] for item in order)])
    fewest = max(1, -(-len(_cut(items, budget_tokens)) // ranks))
    candidates = range(fewest, 4 * fewest + 1, max(1, fewest // 4))
    plans = [_plan(items, ranks, passes, budget_tokens) for passes in candidates]
    best = min(plans, key=lambda shares: _slowest(shares, items))
    return [[order[start:stop] for start, stop in share] for share in best]


def _plan(items: _Ordered, ranks: int, passes: int, budget: int) -> list[list[Span]]:
    """Return the micro-batches of every rank, `passes` each."""
    spans = _cut(items, _smallest_budget(items, passes * ranks, budget))
    return _deal(_fill_up(spans, passes * ranks, items), ranks, items)


def _slowest(shares: Sequence[Sequence[Span]], items: _Ordered) -> int:
    """Return the cost of the rank with the most work, in tokens."""
    return max(sum(items.padded_tokens(span) + PASS_OVERHEAD_TOKENS for span in share) for share in shares)


def _cut(items: _Ordered, budget: int) -> list[Span]:
    """Cut items into consecutive spans, each as wide as the budget allows and at least one item wide."""
    spans, start = [], 0
    while start < len(items.lengths):
        samples = items.samples_before[start] + budget // items.lengths[start]
        stop = max(start + 1, bisect_right(items.samples_before, samples, lo=start) - 1)
        spans.append((start, stop))
        start = stop
    return spans


def _smallest_budget(items: _Ordered, count: int, budget: int) -> int:
    """Return the smallest budget up to `budget` that gives at most `count` spans, by bisection."""
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(items, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return high


def _fill_up(spans: list[Span], count: int, items: _Ordered) -> list[Span]:
    """Halve the largest spans until there are `count`; add empty spans if only single items are left."""
    spans = list(spans)
    while len(spans) < count:
        divisible = [span for span in spans if span[1] - span[0] > 1]
        if not divisible:
            return spans + [(0, 0)] * (count - len(spans))
        start, stop = max(divisible, key=items.padded_tokens)
        middle = (start + stop) // 2
        spans.remove((start, stop))
        spans += [(start, middle), (middle, stop)]
    return spans


def _deal(spans: Sequence[Span], ranks: int, items: _Ordered) -> list[list[Span]]:
    """Give every rank one span per round, largest spans first, the largest of a round to the least loaded rank."""
    ordered = sorted(spans, key=lambda span: (-items.padded_tokens(span), span))
    shares: list[list[Span]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for start in range(0, len(ordered), ranks):
        by_load = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for rank, span in zip(by_load, ordered[start : start + ranks], strict=True):
            shares[rank].append(span)
            loads[rank] += items.padded_tokens(span)
    return shares


def collate(
    items: Sequence[PackItem], pad_id: int, rows: Sequence[Sequence[int]] | None = None, *, parts: int = 1
) -> MicroBatch:
    """Pad rows to one length, and align masks and values with the targets.

    Without items, the result is one row of padding that trains nothing, because all ranks must run the same number of
    forward and backward passes.

    Args:
        items: items of the micro-batch.
        pad_id: token id of the padding.
        rows: numbers of the items whose samples share a row, in ascending order from the first row to the last; None
            gives every sample a row of its own.
        parts: number of parts in which the logits of the targets are computed.
    """
    samples = [sample for item in items for sample in item.samples]
    if rows is None:
        packed = [pack([sample.token_ids]) for sample in samples]
    else:
        packed = [pack([sample.token_ids for number in row for sample in items[number].samples]) for row in rows]
    padded = pad_rows(packed, pad_id)
    trained = [np.flatnonzero(sample.targets) for sample in samples]  # never token 0
    starts = np.cumsum([0, *(len(each) for each in trained)])

    def positions(mask: BoolArray | None, number: int) -> np.ndarray:
        """Return the target numbers of a term in a sample; an empty array without a mask."""
        return _NO_TARGETS if mask is None else starts[number] + np.flatnonzero(mask[trained[number]])

    targets = (place[at - 1] for place, at in zip(padded.places, trained, strict=True))
    target_ids = (sample.token_ids[at] for sample, at in zip(samples, trained, strict=True))
    return MicroBatch(
        input_ids=torch.from_numpy(padded.input_ids),
        depths=None if padded.depths is None else torch.from_numpy(padded.depths),
        attention=padded.attention,
        targets=torch.from_numpy(np.concatenate([_NO_TARGETS, *targets])),
        target_ids=torch.from_numpy(np.concatenate([_NO_TARGETS, *target_ids]).astype(np.int64)),
        parts=parts,
        real_tokens=sum(row.length for row in packed),
        policy=_policy_targets(samples, [positions(sample.policy_mask, n) for n, sample in enumerate(samples)]),
        sft=_sft_targets(samples, [positions(sample.sft_mask, n) for n, sample in enumerate(samples)]),
        pairs=_pair_targets(
            [item.pair for item in items if item.pair],
            [
                positions(sample.preference_mask, n)
                for n, sample in enumerate(samples)
                if sample.preference_mask is not None
            ],
        ),
    )


_NO_TARGETS = np.zeros(0, dtype=np.int64)


def _policy_targets(samples: Sequence[Sample], positions: Sequence[np.ndarray]) -> PolicyTargets | None:
    trained = [(index, sample.policy) for index, sample in enumerate(samples) if sample.policy is not None]
    if not trained:
        return None
    counts = [len(positions[index]) for index, _ in trained]

    def gather(values_of: Callable[[PolicyTokens], Float32Array | None]) -> Tensor | None:
        """Return the values of all targets, or None if a sample lacks them."""
        arrays = [(values_of(tokens), tokens.mask) for _, tokens in trained]
        at_targets = [values[1:][mask[1:]] for values, mask in arrays if values is not None]
        if len(at_targets) < len(trained):
            return None
        return torch.from_numpy(np.concatenate(at_targets).astype(np.float32))

    behavior, advantages = gather(lambda tokens: tokens.behavior_logprobs), gather(lambda tokens: tokens.advantages)
    assert behavior is not None and advantages is not None  # noqa: S101 - every sample has them
    return PolicyTargets(
        positions=torch.from_numpy(np.concatenate([positions[index] for index, _ in trained])),
        row_ids=torch.from_numpy(np.repeat([index for index, _ in trained], counts)),
        behavior_logprobs=behavior,
        advantages=advantages,
        weights=torch.from_numpy(np.repeat([tokens.weight for _, tokens in trained], counts).astype(np.float32)),
        old_logprobs=gather(lambda tokens: tokens.old_logprobs),
        reference_logprobs=gather(lambda tokens: tokens.reference_logprobs),
        values=gather(lambda tokens: tokens.values),
        returns=gather(lambda tokens: tokens.returns),
    )


def _sft_targets(samples: Sequence[Sample], positions: Sequence[np.ndarray]) -> SftTargets | None:
    if all(sample.sft_mask is None for sample in samples):
        return None
    weights = np.repeat([sample.sft_weight for sample in samples], [len(numbers) for numbers in positions])
    return SftTargets(
        positions=torch.from_numpy(np.concatenate(positions)), weights=torch.from_numpy(weights.astype(np.float32))
    )


def _pair_targets(pairs: Sequence[Pair], positions: Sequence[np.ndarray]) -> PairTargets | None:
    """Return the targets of pairs. `positions` has the chosen and the rejected side of every pair in turn."""
    if not pairs:
        return None
    return PairTargets(
        positions=torch.from_numpy(np.concatenate(positions)),
        segments=torch.from_numpy(np.repeat(np.arange(len(positions)), [len(numbers) for numbers in positions])),
        reference=torch.tensor([pair.reference for pair in pairs], dtype=torch.float64).flatten(),
        smoothing=torch.tensor([pair.smoothing for pair in pairs], dtype=torch.float64),
        weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float64),
    )


def to_device(tensors: Tensors, device: str) -> Tensors:
    """Return a copy of a dataclass whose tensors, nested dataclasses included, are on `device`."""
    changes: dict[str, Any] = {}
    for field in fields(tensors):  # type: ignore[arg-type]
        value = getattr(tensors, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.to(device)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(to_device(each, device) for each in value)
        elif hasattr(value, "__dataclass_fields__"):
            changes[field.name] = to_device(value, device)
    return replace(tensors, **changes)  # type: ignore[type-var]
