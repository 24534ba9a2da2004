"""Distillation: losses that bring the policy's distribution of the next token to a teacher's.

A teacher gives K tokens at every place, with their log-probabilities. The rest of both distributions is one more token:
without it, a policy that gives all probability to other tokens would have no loss, and a policy equal to the teacher
would still have a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learners.objective.losses import LossOutput, policy_loss

LEAST_LOGPROB = -60.0  # nats; an engine may report -inf, and 0 * inf is NaN


def divergence_loss(
    logprobs: Tensor, teacher: Tensor, weights: Tensor, *, beta: float, interpolation: float = 1.0
) -> LossOutput:
    """Compute the generalised Jensen-Shannon divergence between teacher q and policy p, over K tokens and the rest.

    D_0 = KL(q || p);   D_1 = KL(p || q)
    D_b = b KL(q || m) + (1 - b) KL(p || m),   m = b q + (1 - b) p,   for 0 < b < 1
    loss = sum_t w_t D_b(t)

    With an interpolation t below 1, the teacher is replaced by the distribution proportional to sg[p]^(1 - t) q^t.

    With t = 1 the value never exceeds that of the whole distributions, and grows with K. Value and gradient are 0 where
    p = q.

    Args:
        logprobs: [M, K] nats, of the teacher's tokens under the policy; carries gradient.
        teacher: [M, K] nats, of the same tokens under the teacher.
        weights: [M].
        beta: in [0, 1].
        interpolation: t, in (0, 1].

    Returns:
        metrics: divergence, nats.

    Raises:
        ValueError: beta is outside of [0, 1].

    Source: GKD, arXiv:2306.13649, sec. 2 and 3. The two limits are defined as in TRL. Interpolation of logits: TAID,
        arXiv:2501.16937, eq. 3.
    """
    values = divergences(logprobs, teacher, beta=beta, interpolation=interpolation)
    return LossOutput((weights * values).sum(), {"divergence": values.detach().sum()})


def divergences(logprobs: Tensor, teacher: Tensor, *, beta: float, interpolation: float = 1.0) -> Tensor:
    """Return the [M] divergences D_b of `divergence_loss`, nats; they carry gradient."""
    if not 0 <= beta <= 1:
        raise ValueError(f"expected objective.distill.beta in [0, 1], found {beta}")
    p, q = with_rest(logprobs), with_rest(teacher)
    if interpolation < 1:
        q = ((1 - interpolation) * p.detach() + interpolation * q).log_softmax(-1)
    if beta in (0, 1):
        return _kl(q, p) if beta == 0 else _kl(p, q)
    mixture = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    return beta * _kl(q, mixture) + (1 - beta) * _kl(p, mixture)


def sampled_loss(
    logprobs: Tensor, behavior: Tensor, teacher: Tensor, weights: Tensor, *, clip_low: float, clip_high: float
) -> LossOutput:
    """Compute the reverse divergence KL(p || q) from the sampled tokens alone, by the policy gradient.

    A_t = log q(y_t) - log p_behavior(y_t), without gradient, is the advantage of token y_t; see `policy_loss`.

    The expected gradient over samples of p is that of KL(p || q) of every next token, given the tokens before.

    Args:
        logprobs: [M] nats, of the sampled tokens; carries gradient.
        behavior: [M] nats, as sampled.
        teacher: [M] nats, of the same tokens under the teacher.
        weights: [M].
        clip_low, clip_high: bounds of the ratio, as in `policy_loss`.

    Returns:
        metrics: divergence, nats: the estimate log p_behavior - log q.

    Source: MiniLLM, arXiv:2306.08543, sec. 2.2: the single-step part of the gradient of its eq. 2.
    """
    advantages = teacher.clamp(min=LEAST_LOGPROB) - behavior
    loss = policy_loss(logprobs, behavior, advantages, weights, clip_low=clip_low, clip_high=clip_high).loss
    return LossOutput(loss, {"divergence": -advantages.sum()})


def with_rest(logprobs: Tensor) -> Tensor:
    """Return [M, K + 1] log-probabilities in fp64: those of K tokens, and that of all others together."""
    given = logprobs.double().clamp(min=LEAST_LOGPROB)
    total = given.logsumexp(-1, keepdim=True).clamp(max=-1e-12)  # rounding may bring it above 0
    rest = torch.log(-torch.expm1(total)).clamp(min=LEAST_LOGPROB)
    return torch.cat([given, rest], dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return [M] KL(p || q) of [M, K] log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)
