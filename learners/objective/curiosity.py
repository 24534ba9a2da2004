"""The policy itself at a temperature of each token, as a teacher that keeps supervised training from overconfidence."""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, HIGHEST = 1.1, 1.5
"""Bounds of the temperature."""
CERTAIN = 0.03
"""Entropy in nats up to which a token has the lowest temperature."""
TOKENS = 512
"""Number of the most probable tokens over which entropies are computed."""
HALVINGS = 20


def softened_logprobs(distribution: Tensor, target_ids: Tensor) -> Tensor:
    """Compute log p~ of targets, where p~ is the policy at a temperature tau of each token.

    p~ ~ p^(1 / tau);   H(p~) = H(p) + 0.5 sigmoid(2 (H(p) - 1.2)),   with tau bounded to [1.1, 1.5]

    So an uncertain token is made more uncertain, and a certain one hardly. tau is 1.1 where H(p) <= 0.03. H is over the
    512 most probable tokens, renormalised.

    Args:
        distribution: [N, V] log-probabilities of the policy, nats.
        target_ids: [N] int64.

    Returns:
        [N] nats, without gradient.

    Source: CurioSFT, arXiv:2602.02244; the constants are those of the released code.
    """
    with torch.no_grad():
        tau = temperatures(distribution)
        softened = distribution / tau.unsqueeze(-1)
        return softened.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1) - softened.logsumexp(-1)


def temperatures(distribution: Tensor) -> Tensor:
    """Return the [N] temperatures of `softened_logprobs`, by bisection: the entropy grows with the temperature."""
    top = distribution.topk(min(TOKENS, distribution.shape[-1]), dim=-1).values
    now = _entropy(top, torch.ones_like(top[:, 0]))
    wanted = now + 0.5 * torch.sigmoid(2 * (now - 1.2))
    low, high = torch.full_like(now, LOWEST), torch.full_like(now, HIGHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_low = _entropy(top, middle) < wanted
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.where(now <= CERTAIN, LOWEST, (low + high) / 2)


def curious_loss(logprobs: Tensor, softened: Tensor, weights: Tensor, *, weight: float) -> Tensor:
    """Compute sum_t w_t weight / 2 (log p_t - log p~_t)^2; its gradient lowers p where p is above p~.

    Args:
        logprobs: [N] nats, of the policy; carries gradient.
        softened: [N] nats, of `softened_logprobs`.
        weights: [N].
        weight: 1 in the paper, beside the negative log-likelihood.
    """
    return weight / 2 * (weights * (logprobs - softened).square()).sum()


def _entropy(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return the [N] entropies of [N, K] logits at [N] temperatures."""
    own = (logits / temperature.unsqueeze(-1)).log_softmax(-1)
    return torch.special.entr(own.exp()).sum(-1)
