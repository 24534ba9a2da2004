"""Log-probabilities of given tokens under the policy, with the same definition as in the sampler."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor,
    target_ids: Tensor,
    temperature: Tensor,
    *,
    entropy_at: Tensor | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute log p(target), and the entropy at a subset of the positions.

    p = softmax(logits / temperature);   entropy = -sum_v p_v log p_v

    The sampler reports log-probabilities after the temperature, so the learner must divide by the same temperature.
    Half-precision logits are raised to fp32 before the division, as in the sampler.

    Args:
        logits: [N, V], any float dtype; carries gradient.
        target_ids: [N] int64.
        temperature: [N], > 0.
        entropy_at: [N] bool, M of them True: where the entropy is computed. None computes no entropy.
        entropy_gradient: whether the entropy carries gradient.

    Returns:
        logprobs: [N] nats, fp32 (fp64 for fp64 logits); carries gradient, also for N = 0.
        entropy: [M] nats; carries gradient with `entropy_gradient`.

    Raises:
        ValueError: a temperature is not positive, or shapes differ.
    """
    if not bool((temperature > 0).all()):
        raise ValueError(f"expected sampling.temperature > 0, found {temperature.min()}")
    if not len(logits) == len(target_ids) == len(temperature):
        raise ValueError(
            f"expected logits [N, V] with [N] targets and temperatures, found {tuple(logits.shape)}, "
            f"{tuple(target_ids.shape)}, {tuple(temperature.shape)}"
        )
    if logits.dtype != torch.float64:
        logits = logits.float()
    distribution = torch.log_softmax(logits / temperature.to(logits).unsqueeze(-1), dim=-1)
    logprobs = distribution.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
    if entropy_at is None:
        return logprobs, logprobs.new_zeros(0)
    if not bool(entropy_at.all()):
        distribution = distribution.index_select(0, entropy_at.nonzero().squeeze(-1))
    return logprobs, _entropy(distribution if entropy_gradient else distribution.detach())


def _entropy(distribution: Tensor) -> Tensor:
    """Compute the [M] entropies of [M, V] log-probabilities."""
    if distribution.requires_grad:  # the derivative of entr is infinite at p = 0
        return -(distribution.exp() * distribution).sum(dim=-1)
    # entr(p) = -p log p is 0 at p = 0, where p * log p would be NaN.
    return torch.special.entr(distribution.exp()).sum(dim=-1)
