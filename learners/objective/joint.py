"""The joint loss: how rows, pairs and tokens of all terms add up to one number.

    loss = sum_c weight_c * loss_c / denominator_c

over the terms policy, kl, preference and sft, each with the count of its own tokens or pairs in the whole update, of
all ranks and micro-batches, so that no term depends on which others are there or on how rows are spread. The critic's
term, value, has parameters of its own and is divided by its own count in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from learners.objective import losses
from learners.objective.advantages import Float64Array
from learners.objective.losses import LossOutput
from learners.objective.preferences import pair_scores, preference_loss
from learners.samples.batching import MicroBatch, PairTargets, PolicyTargets
from learners.samples.types import Unit, trained
from rlsys.config.objective import ObjectiveConfig, PolicyConfig, PreferenceConfig

LossAggregation = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(completion_lengths: Sequence[int], *, aggregation: LossAggregation, max_tokens: int) -> Float64Array:
    """Weight of each trained token of each row, so that loss = sum_rows w_row sum_tokens l.

    token_mean:     w_i = 1 / sum_j |o_j|              every token counts the same (DAPO)
    sequence_mean:  w_i = 1 / (n |o_i|)                every row counts the same (GRPO)
    constant:       w_i = 1 / (rows * max_tokens)      no dependence on lengths (Dr.GRPO)

    A row without trained tokens adds no loss. It counts as one of the `rows` of constant, whose denominator
    must not depend on what was sampled; it is not one of the n rows of sequence_mean, where the mean over
    its tokens does not exist.

    Args:
        completion_lengths: |o_i|, trained tokens of every row of the optimizer update: of all ranks and all
            micro-batches, or the loss would depend on how rows are spread over them.
        aggregation: one of the above.
        max_tokens: bound of a completion, `sampling.max_tokens`; used by constant only.

    Returns:
        [rows] float64.

    Raises:
        ValueError: negative length, max_tokens < 1, or an unknown aggregation.

    Source: DAPO, arXiv:2503.14476, eq. 12; GRPO, arXiv:2402.03300, eq. 3; Dr.GRPO, arXiv:2503.20783,
        sec. 3.2.
    """
    lengths = np.asarray(completion_lengths, dtype=np.float64)
    if max_tokens < 1 or (lengths < 0).any():
        raise ValueError(f"expected max_tokens >= 1 and lengths >= 0, found {max_tokens} and {completion_lengths}")
    match aggregation:
        case "token_mean":
            return np.full(len(lengths), 1.0 / max(lengths.sum(), 1.0))
        case "sequence_mean":
            rows = max(int(np.count_nonzero(lengths)), 1)
            return np.asarray(1.0 / (rows * np.maximum(lengths, 1.0)), dtype=np.float64)
        case "constant":
            return np.full(len(lengths), 1.0 / (max(len(lengths), 1) * max_tokens))
        case _:
            raise ValueError(f"objective.policy.aggregation: unknown value {aggregation!r}")


@dataclass(frozen=True, slots=True)
class Denominators:
    """What the terms of an update are divided by: 0 of a term that nothing in the update is for.

    policy: tokens, sequences, or sequences * max_tokens, by aggregation; of kl too. value: tokens with a return. pairs.
    sft: tokens.
    """

    policy: float
    value: int
    pairs: int
    sft: int


def weighted(units: Sequence[Unit], policy: PolicyConfig, max_tokens: int) -> tuple[list[Unit], Denominators]:
    """The units of an update with the weight of every token and pair in its own term."""
    rows = [row for unit in units for row in unit.rows]
    lengths = [trained(row.policy_mask) for row in rows if row.policy]
    per_row = token_weights(lengths, aggregation=policy.aggregation, max_tokens=max_tokens)
    pairs = sum(unit.pair is not None for unit in units)
    sft = sum(trained(row.sft_mask) for row in rows)
    value = sum(trained(row.policy_mask) for row in rows if row.policy and row.policy.returns is not None)
    weights = iter(per_row.tolist())
    found = [
        Unit(
            rows=tuple(
                replace(
                    row,
                    policy=replace(row.policy, weight=next(weights)) if row.policy else None,
                    sft_weight=1 / max(1, sft),
                )
                for row in unit.rows
            ),
            pair=replace(unit.pair, weight=1 / pairs) if unit.pair else None,
        )
        for unit in units
    ]
    sequences = {
        "token_mean": sum(lengths),
        "sequence_mean": int(np.count_nonzero(lengths)),
        "constant": len(lengths) * max_tokens,
    }
    return found, Denominators(policy=sequences[policy.aggregation], value=value, pairs=pairs, sft=sft)


def joint_loss(
    logprobs: Tensor, entropy: Tensor, batch: MicroBatch, objective: ObjectiveConfig
) -> dict[str, LossOutput]:
    """The part of a micro-batch in the terms of the joint loss, by name, before their weights.

    A term that the micro-batch holds nothing of is left out.

    Args:
        logprobs: [N] nats, of all targets; carries gradient.
        entropy: [M] nats, of the targets of the policy term; carries gradient where policy.entropy_coef is above 0.
        batch: with weights (see `weighted`).
    """
    found: dict[str, LossOutput] = {}
    if batch.policy is not None:
        found["policy"] = _policy_term(logprobs, entropy, batch.policy, objective.policy)
        reference = batch.policy.reference_logprobs
        if reference is not None and not objective.kl.in_reward:
            own, weights = logprobs.index_select(0, batch.policy.at), batch.policy.weights.to(logprobs)
            found["kl"] = losses.kl_loss(own, reference.to(own), weights, estimator=objective.kl.estimator)
    if batch.pairs is not None:
        found["preference"] = preference_term(logprobs, batch.pairs, objective.preference)
    if batch.sft is not None:
        found["sft"] = losses.supervised_loss(logprobs.index_select(0, batch.sft.at), batch.sft.weights.to(logprobs))
    return found


def total(terms: Mapping[str, LossOutput], weights: Mapping[str, float], logprobs: Tensor) -> Tensor:
    """sum_c weight_c loss_c; 0 with a gradient of 0 where there is no term."""
    return sum((weights[name] * term.loss for name, term in terms.items()), logprobs.sum() * 0)


def _policy_term(logprobs: Tensor, entropy: Tensor, targets: PolicyTargets, policy: PolicyConfig) -> LossOutput:
    own, behavior = logprobs.index_select(0, targets.at), targets.behavior_logprobs.to(logprobs)
    advantages, weights = targets.advantages.to(logprobs), targets.weights.to(logprobs)
    metrics: dict[str, Tensor] = {}
    start = own.detach() if targets.old_logprobs is None else targets.old_logprobs.to(own)
    old = start if policy.decoupled else behavior
    if policy.decoupled and policy.importance_cap is not None:
        importance, metrics = losses.importance_weights(start, behavior, cap=policy.importance_cap)
        weights = weights * importance
    bounds = {"clip_low": policy.clip_low, "clip_high": policy.clip_high}
    match policy.surrogate:
        case "clip":
            found = losses.policy_loss(own, old, advantages, weights, **bounds, dual_clip=policy.dual_clip)
        case "gspo":
            found = losses.gspo_loss(own, old, advantages, weights, targets.row_ids, **bounds)
        case "cispo":
            found = losses.cispo_loss(own, old, advantages, weights, **bounds)
    loss = found.loss
    if policy.entropy_coef:
        bonus = losses.entropy_loss(entropy, targets.weights.to(logprobs))
        loss = loss + policy.entropy_coef * bonus.loss
    gap = (start - behavior).abs()
    metrics |= found.metrics | {
        "entropy": entropy.detach().sum(),
        "gap": gap.sum(),
        "gap_max": gap.max() if len(gap) else gap.new_zeros(()),
    }
    return LossOutput(loss, metrics)


def preference_term(logprobs: Tensor, targets: PairTargets, preference: PreferenceConfig) -> LossOutput:
    """The preference loss of the pairs of a micro-batch, by their log-ratios.

    r_j = sum over t in j of logprobs_t - reference_j            of side j of a pair
    r_j = that / number of targets of side j                     with length_norm

    Args:
        logprobs: [N] nats, of all targets; carries gradient.

    Source: length_norm: LN-DPO, Tulu 3, arXiv:2411.15124.
    """
    # Sums of hundreds of terms of which a small difference counts: in double precision, on the few targets there are.
    own = logprobs.index_select(0, targets.at).double()
    scores = pair_scores(own, targets.segments, 2 * len(targets.weights))
    ratios = scores - targets.reference
    if preference.length_norm:
        ratios = ratios / targets.segments.bincount(minlength=len(ratios)).clamp(min=1)
    found = preference_loss(
        ratios[0::2],
        ratios[1::2],
        targets.weights,
        loss=preference.loss,
        beta=preference.beta,
        label_smoothing=targets.smoothing,
    )
    detached = scores.detach()
    return LossOutput(
        found.loss,
        found.metrics | {"chosen_logprob": detached[0::2].sum(), "rejected_logprob": detached[1::2].sum()},
    )
