"""The joint loss: the weighted sum of the terms policy, kl, preference, sft, distill, ranking and custom.

    loss = sum_c weight_c * loss_c / denominator_c

The denominator of a term counts its own tokens or pairs in the whole update, over all ranks and micro-batches. So the
value of a term depends neither on the other terms nor on the spread of samples over ranks and micro-batches. The critic
has its own parameters and its own loss, the term value, with a denominator of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from learners.objective import losses
from learners.objective.advantages import Float64Array
from learners.objective.curiosity import curious_loss
from learners.objective.distillation import divergence_loss, sampled_loss
from learners.objective.losses import LossOutput
from learners.objective.preferences import pair_scores, preference_loss
from learners.objective.ranking import ranking_loss
from learners.objective.token_selection import confidence_gate, recalibrated, uncertain_entropy
from learners.plugins import custom_loss
from learners.samples.batching import DistillTargets, MicroBatch, PairTargets, PolicyTargets, RankingTargets
from learners.samples.types import PackItem, Sample, count_targets
from rlsys.config.objective import CustomLossConfig, DistillConfig, ObjectiveConfig, PolicyConfig, PreferenceConfig

LossAggregation = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(completion_lengths: Sequence[int], *, aggregation: LossAggregation, max_tokens: int) -> Float64Array:
    """Compute the weight of each trained token, so that loss = sum_samples w_i sum_tokens l.

    token_mean:     w_i = 1 / sum_j |o_j|              every token counts the same (DAPO)
    sequence_mean:  w_i = 1 / (n |o_i|)                every sample counts the same (GRPO)
    constant:       w_i = 1 / (samples * max_tokens)   no dependence on lengths (Dr.GRPO)

    A sample without trained tokens adds no loss. It counts in the denominator of `constant`, which must not depend on
    the sampled lengths. It does not count in the n of `sequence_mean`, because it has no mean over tokens.

    Args:
        completion_lengths: |o_i|, trained tokens of every sample of the optimizer update. They must cover all ranks
            and micro-batches; otherwise the loss depends on the spread of samples over them.
        aggregation: one of the above.
        max_tokens: length limit of a completion, `sampling.max_tokens`; used by constant only.

    Returns:
        [samples] float64.

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
            samples = max(int(np.count_nonzero(lengths)), 1)
            return np.asarray(1.0 / (samples * np.maximum(lengths, 1.0)), dtype=np.float64)
        case "constant":
            return np.full(len(lengths), 1.0 / (max(len(lengths), 1) * max_tokens))
        case _:
            raise ValueError(f"objective.policy.aggregation: unknown value {aggregation!r}")


@dataclass(frozen=True, slots=True)
class Denominators:
    """Global denominators of the terms in one update; 0 for a term without targets.

    Attributes:
        policy: tokens, samples, or samples * max_tokens, by aggregation; also the denominator of kl and custom.
        value: tokens with a return.
        pairs: preference pairs.
        sft: supervised tokens.
        ranking: prompts with a right and a wrong answer.
        distill: tokens that a teacher scored, in own chains and other rows together.
    """

    policy: float
    value: int
    pairs: int
    sft: int
    distill: int = 0
    ranking: int = 0

    @property
    def by_term(self) -> dict[str, float]:
        """Denominators by the name of the term."""
        return {
            "policy": self.policy,
            "kl": self.policy,
            "value": self.value,
            "preference": self.pairs,
            "sft": self.sft,
            "distill": self.distill,
            "ranking": self.ranking,
            "custom": self.policy,
        }


def weigh_items(
    items: Sequence[PackItem], policy: PolicyConfig, max_tokens: int, on_policy_share: float = 1.0
) -> tuple[list[PackItem], Denominators]:
    """Set the weight of every token and pair in its own term.

    Args:
        items: all items of one update, of all ranks and micro-batches.
        policy: configuration of the policy term, for the aggregation.
        max_tokens: length limit of a completion, `sampling.max_tokens`.
        on_policy_share: lambda of the term distill: loss = lambda mean over the tokens of the policy's own chains +
            (1 - lambda) mean over the tokens of other rows. A part without tokens adds nothing.

    Returns:
        The items with their weights, and the denominators from which the weights follow.
    """
    samples = [sample for item in items for sample in item.samples]
    lengths = [count_targets(sample.policy_mask) for sample in samples if sample.policy]
    policy_weights = iter(token_weights(lengths, aggregation=policy.aggregation, max_tokens=max_tokens).tolist())
    pairs = sum(item.pair is not None for item in items)
    sft = sum(count_targets(sample.sft_mask) for sample in samples)
    ranking = sum(item.ranking is not None for item in items)
    shares, distilled = {True: on_policy_share, False: 1 - on_policy_share}, _distilled(samples)
    value = sum(
        count_targets(sample.policy_mask) for sample in samples if sample.policy and sample.policy.returns is not None
    )

    def weigh(sample: Sample) -> Sample:
        tokens = replace(sample.policy, weight=next(policy_weights)) if sample.policy else None
        distill = sample.distill
        if distill:
            distill = replace(distill, weight=shares[distill.own] / max(1, distilled[distill.own]))
        return replace(sample, policy=tokens, sft_weight=1 / max(1, sft), distill=distill)

    weighted = [
        PackItem(
            samples=tuple(weigh(sample) for sample in item.samples),
            pair=replace(item.pair, weight=1 / pairs) if item.pair else None,
            ranking=replace(item.ranking, weight=1 / ranking) if item.ranking else None,
        )
        for item in items
    ]
    policy_denominator = {
        "token_mean": sum(lengths),
        "sequence_mean": int(np.count_nonzero(lengths)),
        "constant": len(lengths) * max_tokens,
    }[policy.aggregation]
    tokens = sum(distilled.values())
    return weighted, Denominators(
        policy=policy_denominator, value=value, pairs=pairs, sft=sft, distill=tokens, ranking=ranking
    )


def _distilled(samples: Sequence[Sample]) -> dict[bool, int]:
    """Return the tokens of the term distill: in the policy's own chains (True) and in other rows (False)."""
    tokens = {True: 0, False: 0}
    for sample in samples:
        if sample.distill:
            tokens[sample.distill.own] += count_targets(sample.distill_mask)
    return tokens


def joint_loss(
    logprobs: Tensor,
    entropy: Tensor,
    batch: MicroBatch,
    objective: ObjectiveConfig,
    others: Tensor | None = None,
    interpolation: float = 1.0,
    softened: Tensor | None = None,
) -> dict[str, LossOutput]:
    """Compute the contribution of a micro-batch to each term of the joint loss, before the term's weight.

    Args:
        logprobs: [N] nats, of all targets; carries gradient.
        entropy: [M] nats, of the targets of the policy term; carries gradient if policy.entropy_coef is above 0.
        batch: micro-batch with the weights of `weigh_items`.
        objective: the joint objective.
        others: [P, K] nats, of the tokens that the teacher scored at the P targets of the term distill, or [P, 1]
            divergences from a teacher of the whole vocabulary; None without such targets.
        interpolation: share of the teacher in this step; see `divergence_loss`.
        softened: [S] nats, of the supervised targets under the softened policy; None if sft.curiosity is 0.

    Returns:
        Losses by term, without the terms that have no target in the micro-batch.
    """
    terms: dict[str, LossOutput] = {}
    if batch.policy is not None:
        terms["policy"] = _policy_term(logprobs, entropy, batch.policy, objective.policy)
        reference = batch.policy.reference_logprobs
        if reference is not None and not objective.kl.in_reward:
            own, weights = logprobs.index_select(0, batch.policy.positions), batch.policy.weights.to(logprobs)
            terms["kl"] = losses.kl_loss(own, reference.to(own), weights, estimator=objective.kl.estimator)
        if objective.custom.used:
            terms["custom"] = _custom_term(logprobs, batch.policy, objective.custom)
    if batch.pairs is not None:
        terms["preference"] = preference_term(logprobs, batch.pairs, objective.preference)
    if batch.sft is not None:
        own, weights = logprobs.index_select(0, batch.sft.positions), batch.sft.weights.to(logprobs)
        terms["sft"] = losses.supervised_loss(own, weights)
        if objective.sft.curiosity:
            assert softened is not None  # noqa: S101 - the forward pass gives them for this key
            curious = curious_loss(own, softened.to(own), weights, weight=objective.sft.curiosity)
            terms["sft"] = LossOutput(terms["sft"].loss + curious, {})
    if batch.distill is not None:
        assert others is not None  # noqa: S101 - the forward pass gives them wherever there are such targets
        terms["distill"] = _distill_term(logprobs, others, batch.distill, objective, interpolation)
    if batch.ranking is not None:
        terms["ranking"] = _ranking_term(logprobs, batch.ranking)
    return terms


def _custom_term(logprobs: Tensor, targets: PolicyTargets, config: CustomLossConfig) -> LossOutput:
    own = logprobs.index_select(0, targets.positions)
    names = ("behavior_logprobs", "advantages", "weights")
    return LossOutput(custom_loss(own, {name: getattr(targets, name).to(own) for name in names}, config), {})


def _ranking_term(logprobs: Tensor, targets: RankingTargets) -> LossOutput:
    own = logprobs.index_select(0, targets.positions)
    sums = own.new_zeros(len(targets.is_right)).index_add(0, targets.segments, own)
    means = sums / targets.segments.bincount(minlength=len(sums))
    return ranking_loss(means, targets.is_right, targets.prompts, targets.weights.to(means))


def _distill_term(
    logprobs: Tensor, others: Tensor, targets: DistillTargets, objective: ObjectiveConfig, interpolation: float
) -> LossOutput:
    weights = targets.weights.to(others)
    if targets.logprobs is None:  # the pass has computed the divergences
        return LossOutput((weights * others[:, 0]).sum(), {"divergence": others.detach().sum()})
    teacher = targets.logprobs.to(others)
    if objective.distill.divergence == "top_k":
        return _divergence_term(others, teacher, weights, targets.row_ids, objective.distill, interpolation)
    own = logprobs.index_select(0, targets.positions)
    assert targets.behavior_logprobs is not None  # noqa: S101 - the plan of the stage has sampled tokens only
    bounds = {"clip_low": objective.policy.clip_low, "clip_high": objective.policy.clip_high}
    return sampled_loss(own, targets.behavior_logprobs.to(own), teacher[:, 0], weights, **bounds)


def _divergence_term(
    others: Tensor, teacher: Tensor, weights: Tensor, row_ids: Tensor, distill: DistillConfig, interpolation: float
) -> LossOutput:
    if distill.teacher_temperature != 1:
        teacher = recalibrated(teacher, distill.teacher_temperature)
    gated = weights * confidence_gate(others, teacher) if distill.confidence_gate else weights
    output = divergence_loss(others, teacher, gated, beta=distill.beta, interpolation=interpolation)
    if not distill.entropy_coef:
        return output
    entropy = uncertain_entropy(others, weights, row_ids, share=distill.entropy_share)
    return LossOutput(output.loss + distill.entropy_coef * entropy, output.metrics)


def total_loss(terms: Mapping[str, LossOutput], weights: Mapping[str, float], logprobs: Tensor) -> Tensor:
    """Compute sum_c weight_c loss_c.

    Args:
        terms: losses by term.
        weights: weights by term.
        logprobs: [N]; without terms, the result is 0 and has zero gradients for these log-probabilities.
    """
    return sum((weights[name] * term.loss for name, term in terms.items()), logprobs.sum() * 0)


def _policy_term(logprobs: Tensor, entropy: Tensor, targets: PolicyTargets, policy: PolicyConfig) -> LossOutput:
    own, behavior = logprobs.index_select(0, targets.positions), targets.behavior_logprobs.to(logprobs)
    advantages, weights = targets.advantages.to(logprobs), targets.weights.to(logprobs)
    metrics: dict[str, Tensor] = {}
    old = own.detach() if targets.old_logprobs is None else targets.old_logprobs.to(own)
    base = old if policy.decoupled else behavior  # denominator of the ratio
    if policy.decoupled and policy.importance_cap is not None:
        importance, metrics = losses.importance_weights(old, behavior, cap=policy.importance_cap)
        weights = weights * importance
    if policy.teacher_share:
        assert targets.teacher_logprobs is not None  # noqa: S101 - the teacher scores every trajectory, or fails it
        base = losses.anchored(base, targets.teacher_logprobs.to(base), share=policy.teacher_share)
    bounds = {"clip_low": policy.clip_low, "clip_high": policy.clip_high}
    match policy.surrogate:
        case "clip":
            surrogate = losses.policy_loss(own, base, advantages, weights, **bounds, dual_clip=policy.dual_clip)
        case "gspo":
            surrogate = losses.gspo_loss(own, base, advantages, weights, targets.row_ids, **bounds)
        case "cispo":
            surrogate = losses.cispo_loss(own, base, advantages, weights, **bounds)
    loss = surrogate.loss
    if policy.entropy_coef:
        bonus = losses.entropy_loss(entropy, targets.weights.to(logprobs))
        loss = loss + policy.entropy_coef * bonus.loss
    gap = (old - behavior).abs()
    metrics |= surrogate.metrics | {
        "entropy": entropy.detach().sum(),
        "gap": gap.sum(),
        "gap_max": gap.max() if len(gap) else gap.new_zeros(()),
    }
    return LossOutput(loss, metrics)


def preference_term(logprobs: Tensor, targets: PairTargets, preference: PreferenceConfig) -> LossOutput:
    """Compute the preference loss of a micro-batch from the log-ratio of each side of its pairs.

    r_j = sum over t in j of logprobs_t - reference_j                                          for side j of a pair
    r_j = (sum over t in j of logprobs_t - reference_j) / number of targets of side j          with length_norm

    Args:
        logprobs: [N] nats, of all targets; carries gradient.
        targets: targets of the pairs.
        preference: configuration of the preference term.

    Source: length_norm: LN-DPO, Tulu 3, arXiv:2411.15124.
    """
    # Double precision, because small differences between sums of hundreds of terms matter. The targets are few.
    own = logprobs.index_select(0, targets.positions).double()
    scores = pair_scores(own, targets.segments, 2 * len(targets.weights))
    ratios = scores - targets.reference
    if preference.length_norm:
        ratios = ratios / targets.segments.bincount(minlength=len(ratios)).clamp(min=1)
    output = preference_loss(
        ratios[0::2],
        ratios[1::2],
        targets.weights,
        loss=preference.loss,
        beta=preference.beta,
        label_smoothing=targets.smoothing,
    )
    detached = scores.detach()
    return LossOutput(
        output.loss,
        output.metrics | {"chosen_logprob": detached[0::2].sum(), "rejected_logprob": detached[1::2].sum()},
    )
