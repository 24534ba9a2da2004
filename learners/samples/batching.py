"""Conversion of training samples to the tensors of one forward pass: padded rows, with the targets of every term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from learners.samples.packing import RowAttention, pack, pad_rows
from learners.samples.types import PackItem, PolicyTokens, Sample
from rlsys.types import BoolArray, Float32Array

Tensors = TypeVar("Tensors")


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
    teacher_logprobs: Tensor | None = None


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
class RankingTargets:
    """M targets of the S answers of the R ranked prompts of a micro-batch.

    Attributes:
        positions: [M] int64, indices into the N targets of the micro-batch.
        segments: [M] int64, answer of each target, from 0 to S - 1.
        is_right: [S] bool.
        prompts: [S] int64, prompt of each answer, ascending, from 0 to R - 1.
        weights: [R] float32.
    """

    positions: Tensor
    segments: Tensor
    is_right: Tensor
    prompts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillTargets:
    """M targets of the term distill, with K tokens each that a teacher scored.

    Attributes:
        positions: [M] int64, indices into the N targets of the micro-batch, in ascending order.
        row_ids: [M] int64, sample of each target.
        ids: [M, K] int64, tokens that could stand there; None for a teacher of the whole vocabulary.
        logprobs: [M, K] float32, nats, of these tokens under the teacher; None for such a teacher.
        behavior_logprobs: [M] float32, nats, of the targets as sampled; None if any sample was not sampled.
        weights: [M] float32.
    """

    positions: Tensor
    row_ids: Tensor
    ids: Tensor | None
    logprobs: Tensor | None
    behavior_logprobs: Tensor | None
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
        distill: targets of the term distill; None if no sample has any.
        ranking: targets of the term ranking; None if no prompt is ranked.
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
    distill: DistillTargets | None = None
    ranking: RankingTargets | None = None

    def count(self, term: str) -> int:
        """Return the number of targets of a term; for the term preference, of pairs; for ranking, of prompts."""
        if term == "ranking":
            return len(self.ranking.weights) if self.ranking else 0
        if term == "preference":
            return len(self.pairs.weights) if self.pairs else 0
        targets = {"sft": self.sft, "distill": self.distill}.get(term, self.policy)
        return len(targets.positions) if targets else 0


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
        packed = [pack([sample.inputs]) for sample in samples]
    else:
        packed = [pack([sample.inputs for number in row for sample in items[number].samples]) for row in rows]
    padded = pad_rows(packed, pad_id)
    trained = [np.flatnonzero(sample.targets) for sample in samples]  # never token 0
    starts = np.cumsum([0, *(len(each) for each in trained)])

    def positions(masks: Sequence[BoolArray | None]) -> list[np.ndarray]:
        """Return the target numbers of a term in each sample; an empty array without a mask."""
        return [
            _NO_TARGETS if mask is None else start + np.flatnonzero(mask[at])
            for mask, start, at in zip(masks, starts, trained, strict=False)
        ]

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
        policy=_policy_targets(samples, positions([sample.policy_mask for sample in samples])),
        sft=_sft_targets(samples, positions([sample.sft_mask for sample in samples])),
        pairs=_pair_targets(items, positions([sample.preference_mask for sample in samples])),
        distill=_distill_targets(samples, positions([sample.distill_mask for sample in samples])),
        ranking=_ranking_targets(items, positions([sample.ranking_mask for sample in samples])),
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
        teacher_logprobs=gather(lambda tokens: tokens.teacher_logprobs),
    )


def _sft_targets(samples: Sequence[Sample], positions: Sequence[np.ndarray]) -> SftTargets | None:
    if all(sample.sft_mask is None for sample in samples):
        return None
    weights = np.repeat([sample.sft_weight for sample in samples], [len(numbers) for numbers in positions])
    return SftTargets(
        positions=torch.from_numpy(np.concatenate(positions)), weights=torch.from_numpy(weights.astype(np.float32))
    )


def _distill_targets(samples: Sequence[Sample], positions: Sequence[np.ndarray]) -> DistillTargets | None:
    trained = [(numbers, sample.distill) for numbers, sample in zip(positions, samples, strict=True) if sample.distill]
    if not trained:
        return None
    # Token 0 is no target.
    places = [1 + np.flatnonzero(tokens.mask[1:]) for _, tokens in trained]
    pairs = list(zip(places, (tokens for _, tokens in trained), strict=True))
    behavior = [tokens.behavior_logprobs[at] for at, tokens in pairs if tokens.behavior_logprobs is not None]
    weights = [np.full(len(at), tokens.weight, dtype=np.float32) for at, tokens in pairs]
    scores = [(tokens.teacher.ids[at], tokens.teacher.logprobs[at]) for at, tokens in pairs if tokens.teacher]
    return DistillTargets(
        positions=torch.from_numpy(np.concatenate([numbers for numbers, _ in trained])),
        row_ids=torch.from_numpy(np.repeat(np.arange(len(places)), [len(at) for at in places])),
        ids=torch.from_numpy(np.concatenate([ids for ids, _ in scores]).astype(np.int64)) if scores else None,
        logprobs=torch.from_numpy(np.concatenate([logprobs for _, logprobs in scores])) if scores else None,
        behavior_logprobs=torch.from_numpy(np.concatenate(behavior)) if len(behavior) == len(pairs) else None,
        weights=torch.from_numpy(np.concatenate(weights)),
    )


def _own(items: Sequence[PackItem], has: Callable[[PackItem], bool], by_sample: Sequence[Tensors]) -> list[Tensors]:
    """Return the values of the samples of some items, from those of all samples."""
    kept = [has(item) for item in items for _ in item.samples]
    return [value for value, keep in zip(by_sample, kept, strict=True) if keep]


def _pair_targets(items: Sequence[PackItem], by_sample: Sequence[np.ndarray]) -> PairTargets | None:
    pairs = [item.pair for item in items if item.pair]
    if not pairs:
        return None
    positions = _own(items, lambda item: item.pair is not None, by_sample)  # chosen and rejected side in turn
    return PairTargets(
        positions=torch.from_numpy(np.concatenate(positions)),
        segments=torch.from_numpy(np.repeat(np.arange(len(positions)), [len(numbers) for numbers in positions])),
        reference=torch.tensor([pair.reference for pair in pairs], dtype=torch.float64).flatten(),
        smoothing=torch.tensor([pair.smoothing for pair in pairs], dtype=torch.float64),
        weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float64),
    )


def _ranking_targets(items: Sequence[PackItem], by_sample: Sequence[np.ndarray]) -> RankingTargets | None:
    rankings = [item.ranking for item in items if item.ranking]
    if not rankings:
        return None
    positions = _own(items, lambda item: item.ranking is not None, by_sample)  # the answers of every prompt in turn
    answers = [len(ranking.is_right) for ranking in rankings]
    return RankingTargets(
        positions=torch.from_numpy(np.concatenate(positions)),
        segments=torch.from_numpy(np.repeat(np.arange(len(positions)), [len(numbers) for numbers in positions])),
        is_right=torch.tensor([right for ranking in rankings for right in ranking.is_right]),
        prompts=torch.from_numpy(np.repeat(np.arange(len(rankings)), answers)),
        weights=torch.tensor([ranking.weight for ranking in rankings]),
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
