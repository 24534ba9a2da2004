"""Losses as pure functions of per-token tensors.

Every loss is a weighted sum over tokens. The weights already hold the aggregation and the global count of
the update (`learners.objective.token_weights`), so partial losses of micro-batches and ranks simply add up.
Metrics are sums over tokens (a maximum where the name says so), detached, and combine in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) = 4.9e8: far outside any clip range, and still finite in fp32 together with its gradient.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class LossOutput:
    """loss: scalar, carries gradient. metrics: scalars, detached."""

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
) -> LossOutput:
    """Clipped policy-gradient surrogate with separate bounds.

    r_t  = exp(logprobs_t - old_logprobs_t)
    loss = sum_t w_t * -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

    d loss / d logprobs_t = -w_t r_t A_t, and 0 where the clip is active: A > 0 with r above the upper bound
    (`clipped_high`), A < 0 with r below the lower one (`clipped_low`). At r = 1 this is REINFORCE.

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        old_logprobs: [N] nats, of the policy at the start of the training step.
        advantages: [N].
        weights: [N], aggregation over the global denominator.
        clip_low: in [0, 1).
        clip_high: >= 0.

    Returns:
        metrics: clipped_low, clipped_high (counts), ratio_max (0 without tokens).

    Source: PPO, arXiv:1707.06347, eq. 7; GRPO, arXiv:2402.03300, eq. 3; separate bounds: DAPO,
        arXiv:2503.14476, eq. 10.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(weights * torch.minimum(ratio * advantages, bounded * advantages)).sum()
    detached = ratio.detach()
    metrics = {
        "clipped_low": ((advantages < 0) & (detached < 1 - clip_low)).sum(),
        "clipped_high": ((advantages > 0) & (detached > 1 + clip_high)).sum(),
        "ratio_max": detached.max() if len(detached) else detached.new_zeros(()),
    }
    return LossOutput(loss, metrics)


def kl_loss(logprobs: Tensor, reference_logprobs: Tensor, weights: Tensor) -> LossOutput:
    """k3 estimate of KL(policy || reference) on the policy's own samples.

    d_t  = reference_logprobs_t - logprobs_t
    loss = sum_t w_t * (exp(d_t) - 1 - d_t),   every term >= 0
    d loss / d logprobs_t = w_t (1 - exp(d_t))

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        reference_logprobs: [N] nats, of the frozen reference policy.
        weights: [N], aggregation over the global denominator.

    Returns:
        metrics: kl (unweighted sum of the estimates, nats).

    Source: Schulman, Approximating KL divergence (2020), k3; GRPO, arXiv:2402.03300, eq. 4.
    """
    gap = reference_logprobs - logprobs
    # expm1 keeps the terms exact near d = 0, where exp(d) - 1 would cancel.
    terms = torch.expm1(gap) - gap
    return LossOutput((weights * terms).sum(), {"kl": terms.detach().sum()})


def supervised_loss(logprobs: Tensor, weights: Tensor) -> LossOutput:
    """Negative log-likelihood.

    loss = sum_t w_t * -logprobs_t,   d loss / d logprobs_t = -w_t

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        weights: [N], aggregation over the global denominator.
    """
    return LossOutput(-(weights * logprobs).sum(), {})
