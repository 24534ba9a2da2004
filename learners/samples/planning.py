"""Assignment of the items of an optimizer update to the micro-batches of all ranks.

The plan is deterministic, so every rank computes the same plan and takes its own share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np

Entry = TypeVar("Entry")
Span = tuple[int, int]  # range [start, stop) of items that are sorted by descending length

# Fixed cost of a forward and backward pass, in tokens. Measured as 45 for the tiny model on one CPU thread
# (2.5 ms at 18,000 tokens/s). The rest is a margin for the overhead of the engine.
PASS_OVERHEAD_TOKENS = 128


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
