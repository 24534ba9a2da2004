"""Losses as pure functions of per-token tensors.

Every loss is a weighted sum over tokens. The weights include the aggregation and the global denominator of the update
(`learners.objective.joint.token_weights`), so the losses of micro-batches and ranks add up to the loss of the update.
Metrics are detached sums over tokens, or maxima if the name says so, and combine in the same way.

A token of weight 0 with finite inputs adds nothing to the loss, but the metrics count it. NaN is never hidden: 0 * NaN
is NaN, so a NaN makes the loss NaN even at weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# exp(20) = 4.9e8: far outside any clip range, and still finite in fp32 together with its gradient.
MAX_LOG_RATIO = 20.0

# Largest k3 of a token, nats. Without a bound, the gradient of a token at d = 15 is -3.3e6. After clipping by norm, it
# would leave nothing of the other gradients. verl and OpenRLHF have the same bound.
MAX_K3 = 10.0

KlEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss and metrics of a term.

    Attributes:
        loss: scalar; carries gradient.
        metrics: scalars by name, detached.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> LossOutput:
    """Compute the clipped policy-gradient surrogate with separate bounds.

    r_t  = exp(logprobs_t - old_logprobs_t)
    l_t  = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    l_t  = min(l_t, -dual_clip A_t)                                     if A_t < 0 and `dual_clip` is set
    loss = sum_t w_t l_t

    d loss / d logprobs_t = -w_t r_t A_t, and 0 where a clip is active: A > 0 with r above the upper bound
    (`clipped_high`), A < 0 with r below the lower bound (`clipped_low`) or above `dual_clip` (`dual_clipped`).
    At r = 1 this is REINFORCE.

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        old_logprobs: [N] nats, of the policy at the start of the training step.
        advantages: [N].
        weights: [N], aggregation over the global denominator; multiplied by `importance_weights` for decoupled PPO.
        clip_low: in [0, 1).
        clip_high: >= 0.
        dual_clip: > 1, usually 3; bounds the loss of a token with A < 0 by -dual_clip A. None disables the bound.

    Returns:
        metrics: clipped_low, clipped_high (counts), ratio_max (0 without tokens); with `dual_clip` the count
            dual_clipped.

    Raises:
        ValueError: dual_clip is not above 1.

    Source: PPO, arXiv:1707.06347, eq. 7; GRPO, arXiv:2402.03300, eq. 3; separate bounds: DAPO,
        arXiv:2503.14476, eq. 10; dual clip: arXiv:1912.09729.
    """
    ratio = _bounded_exp(logprobs - old_logprobs)
    terms, metrics = _clipped_terms(ratio, advantages, clip_low, clip_high)
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ValueError(f"expected dual_clip > 1, found {dual_clip}")
        negative = advantages < 0
        terms = torch.where(negative, torch.maximum(terms, dual_clip * advantages), terms)
        metrics["dual_clipped"] = (negative & (ratio.detach() > dual_clip)).sum()
    return LossOutput(-(weights * terms).sum(), metrics)


def anchored(old_logprobs: Tensor, teacher: Tensor, *, share: float) -> Tensor:
    """Compute the log-probabilities of the anchor p_old^(1 - share) p_teacher^share, without normalisation.

    As the denominator of the ratio, it lets the trust region follow the teacher where the teacher differs.

    Args:
        old_logprobs: [N] nats.
        teacher: [N] nats, of the same tokens.
        share: in [0, 1).

    Source: RLAD, arXiv:2602.22495: trust region ratio distillation (TRRD), whose a is 1 - share.
    """
    return (1 - share) * old_logprobs + share * teacher


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    row_ids: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> LossOutput:
    """Compute the clipped surrogate with sequence-level ratios, in its token form (GSPO-token).

    s_i   = exp(mean over the targets t of row i of logprobs_t - old_logprobs_t)
    r_t   = sg[s_i] * p_t / sg[p_t]      equal to s_i, with the gradient of p_t
    loss  = sum_t w_t * -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

    d loss / d logprobs_t = -w_t s_i A_t, and 0 for the whole row if the clip is active. With one A_i per row and
    w_t = 1 / (n |o_i|) (aggregation `sequence_mean`), value and gradient equal those of the sequence form
    -(1/n) sum_i min(s_i A_i, clip(s_i) A_i). For rows of one target the loss equals `policy_loss`.

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        old_logprobs: [N] nats, of the policy at the start of the training step.
        advantages: [N].
        weights: [N], aggregation over the global denominator.
        row_ids: [N] int64 >= 0, the row of every target. All targets of a row must be in this call; each counts in
            s_i, even at weight 0.
        clip_low: in [0, 1); the paper uses 3e-4.
        clip_high: >= 0; the paper uses 4e-4.

    Returns:
        metrics: clipped_low, clipped_high (counts of tokens), ratio_max (largest s_i, 0 without tokens).

    Source: GSPO, arXiv:2507.18071, eqs. 5, 7 and 13.
    """
    gap = (logprobs - old_logprobs).detach()
    rows = int(row_ids.max()) + 1 if len(row_ids) else 0
    sums = gap.new_zeros(rows).index_add(0, row_ids, gap)
    lengths = gap.new_zeros(rows).index_add(0, row_ids, torch.ones_like(gap))
    sequence = (sums / lengths.clamp(min=1))[row_ids]
    terms, metrics = _clipped_terms(
        _bounded_exp(logprobs - logprobs.detach() + sequence), advantages, clip_low, clip_high
    )
    return LossOutput(-(weights * terms).sum(), metrics)


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> LossOutput:
    """Compute REINFORCE with a clipped importance ratio, which bounds a token's gradient but never drops it.

    r_t  = exp(logprobs_t - old_logprobs_t)
    loss = sum_t w_t * -sg[clip(r_t, 1 - clip_low, 1 + clip_high)] A_t logprobs_t

    d loss / d logprobs_t = -w_t clip(r_t) A_t, everywhere.

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        old_logprobs: [N] nats, of the policy at the start of the training step.
        advantages: [N].
        weights: [N], aggregation over the global denominator.
        clip_low: in [0, 1]; 1 means no lower bound, as in the paper.
        clip_high: >= 0.

    Returns:
        metrics: clipped_low, clipped_high (counts of ratios outside a bound, for either sign of A), ratio_max
            (before the clip; 0 without tokens).

    Source: MiniMax-M1, arXiv:2506.13585, eqs. 4 and 5.
    """
    ratio = _bounded_exp((logprobs - old_logprobs).detach())
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    metrics = {
        "clipped_low": (ratio < 1 - clip_low).sum(),
        "clipped_high": (ratio > 1 + clip_high).sum(),
        "ratio_max": _largest(ratio),
    }
    return LossOutput(-(weights * bounded * advantages * logprobs).sum(), metrics)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, *, estimator: KlEstimator) -> Tensor:
    """Estimate KL(policy || reference) from each token that the policy sampled.

    d_t = reference_logprobs_t - logprobs_t
    k1  = -d_t                   unbiased; can be negative
    k2  = d_t^2 / 2              biased, >= 0
    k3  = exp(d_t) - 1 - d_t     unbiased, >= 0; at most MAX_K3, which is reached at d_t = 2.61 and d_t = -11

    Args:
        logprobs: [N] nats, of the policy.
        reference_logprobs: [N] nats, of the frozen reference policy.
        estimator: one of the above.

    Returns:
        [N] nats; carries the gradient of the arguments, which is 0 where k3 is at its bound.

    Raises:
        ValueError: unknown estimator.

    Source: Schulman, Approximating KL divergence (2020).
    """
    gap = reference_logprobs - logprobs
    match estimator:
        case "k1":
            return -gap
        case "k2":
            return gap.square() / 2
        case "k3":
            # expm1 keeps the terms exact near d = 0, where exp(d) - 1 would cancel.
            gap = gap.clamp(max=MAX_LOG_RATIO)  # no overflow
            return (torch.expm1(gap) - gap).clamp(max=MAX_K3)
        case _:
            raise ValueError(f"objective.kl.estimator: unknown value {estimator!r}")


def kl_loss(logprobs: Tensor, reference_logprobs: Tensor, weights: Tensor, *, estimator: KlEstimator) -> LossOutput:
    """Compute the estimated KL(policy || reference) on the policy's own tokens, as a loss.

    loss = sum_t w_t k_t,   k_t of `kl_estimate`, d_t = reference_logprobs_t - logprobs_t

    d loss / d logprobs_t = w_t                   k1; 0 in expectation, so use k1 in the reward, not in the loss
                            -w_t d_t              k2; in expectation the gradient of KL(policy || reference)
                            w_t (1 - exp(d_t))    k3; in expectation the gradient of KL(reference || policy);
                                                  0 where k3 is above MAX_K3

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        reference_logprobs: [N] nats, of the frozen reference policy.
        weights: [N], aggregation over the global denominator.
        estimator: "k1", "k2" or "k3".

    Returns:
        metrics: kl (unweighted sum of the estimates, nats).

    Raises:
        ValueError: unknown estimator.

    Source: Schulman, Approximating KL divergence (2020); k3 as a loss: GRPO, arXiv:2402.03300, eq. 4.
    """
    terms = kl_estimate(logprobs, reference_logprobs, estimator=estimator)
    return LossOutput((weights * terms).sum(), {"kl": terms.detach().sum()})


def entropy_loss(entropy: Tensor, weights: Tensor) -> LossOutput:
    """Compute the negative entropy. Its minimisation keeps the policy from collapsing.

    loss = sum_t w_t * -entropy_t,   d loss / d entropy_t = -w_t

    Args:
        entropy: [N] nats, of the policy's distribution at each token; carries gradient.
        weights: [N], aggregation over the global denominator.

    Source: A3C, arXiv:1602.01783, sec. 4.
    """
    return LossOutput(-(weights * entropy).sum(), {})


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> LossOutput:
    """Compute the squared error of the critic, optionally clipped to a band around its old values.

    loss = sum_t w_t * 0.5 max( (V_t - R_t)^2, (clip(V_t, V_old_t - clip, V_old_t + clip) - R_t)^2 )
    loss = sum_t w_t * 0.5 (V_t - R_t)^2                                                                clip None

    d loss / d V_t = w_t (V_t - R_t), and 0 where V_t is outside the band and closer to R_t than the band's edge
    (`value_clipped`).

    Args:
        values: [N], of the critic; carries gradient.
        old_values: [N], of the critic at the start of the training step.
        returns: [N], from `learners.objective.advantages.gae`.
        weights: [N], aggregation over the global denominator.
        clip: > 0, half the width of the band in units of the return; None disables the band.

    Returns:
        metrics: value_clipped (count), squared_error (sum of (V_t - R_t)^2).

    Source: the reference implementation of PPO, described in arXiv:2005.12729, sec. 3.
    """
    errors = (values - returns).square()
    largest = errors
    if clip is not None:
        bounded = values.clamp(old_values - clip, old_values + clip)
        largest = torch.maximum(errors, (bounded - returns).square())
    metrics = {
        "value_clipped": (largest.detach() > errors.detach()).sum(),
        "squared_error": errors.detach().sum(),
    }
    return LossOutput(0.5 * (weights * largest).sum(), metrics)


def supervised_loss(logprobs: Tensor, weights: Tensor) -> LossOutput:
    """Compute the negative log-likelihood.

    loss = sum_t w_t * -logprobs_t,   d loss / d logprobs_t = -w_t

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        weights: [N], aggregation over the global denominator.
    """
    return LossOutput(-(weights * logprobs).sum(), {})


def importance_weights(
    old_logprobs: Tensor, behavior_logprobs: Tensor, *, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute truncated importance weights of off-policy tokens.

    rho_t = exp(old_logprobs_t - behavior_logprobs_t),   w_t = min(rho_t, cap)

    Multiplied with the weights of any policy loss, they give decoupled PPO: the loss clips around the old policy, and
    the importance weights correct for the behavior policy. Equal policies give weights of exactly 1.

    Args:
        old_logprobs: [N] nats, of the policy at the start of the training step.
        behavior_logprobs: [N] nats, of the policy that sampled the tokens.
        cap: > 0, about 2.

    Returns:
        weights: [N], detached.
        metrics: is_ratio_sum, is_ratio_max (of rho, before the cap; 0 without tokens), is_truncated (count).

    Source: decoupled PPO, arXiv:2110.00641; in asynchronous training: AReaL,
        arXiv:2505.24298; token-level truncation: verl's rollout correction.
    """
    ratio = _bounded_exp((old_logprobs - behavior_logprobs).detach())
    metrics = {"is_ratio_sum": ratio.sum(), "is_ratio_max": _largest(ratio), "is_truncated": (ratio > cap).sum()}
    return ratio.clamp(max=cap), metrics


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def _largest(ratio: Tensor) -> Tensor:
    return ratio.max() if len(ratio) else ratio.new_zeros(())


def _clipped_terms(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return min(r A, clip(r) A) of every token, and the metrics of the clip."""
    terms = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    detached = ratio.detach()
    metrics = {
        "clipped_low": ((advantages < 0) & (detached < 1 - clip_low)).sum(),
        "clipped_high": ((advantages > 0) & (detached > 1 + clip_high)).sum(),
        "ratio_max": _largest(detached),
    }
    return terms, metrics
