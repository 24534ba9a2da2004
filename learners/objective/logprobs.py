"""Log-probabilities of given tokens under the policy, with the same definition as in the sampler."""

from __future__ import annotations

import torch
from torch import Tensor

# Positions per entropy chunk; bounds the temporary [chunk, V] tensors.
ENTROPY_CHUNK = 1024


def masked_token_logprobs(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    temperature: float | Tensor,
    *,
    entropy_at: Tensor | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute log p(target) at unmasked positions, and the entropy at a subset of them.

    p = softmax(logits / temperature);   entropy = -sum_v p_v log p_v

    The sampler reports log-probabilities after the temperature, so the learner must divide by the same temperature.
    Half-precision logits are raised to fp32 before the division, as in the sampler. Masked positions are dropped
    before anything of size V is computed.

    Args:
        logits: [B, S, V], any float dtype; carries gradient.
        targets: [B, S] int64, target of the logits at the same position.
        mask: [B, S] bool, N of them True.
        temperature: > 0, one for all positions, or [N] for the unmasked positions.
        entropy_at: [M] int64, ascending indices into the N positions, for the entropy. None computes no entropy.
        entropy_gradient: whether the entropy carries gradient.

    Returns:
        logprobs: [N] nats, row-major order, fp32 (fp64 for fp64 logits); carries gradient, also for N = 0.
        entropy: [M] nats; carries gradient with `entropy_gradient`.

    Raises:
        ValueError: temperature is not positive, or shapes differ.
    """
    if not (bool((temperature > 0).all()) if isinstance(temperature, Tensor) else temperature > 0):
        raise ValueError(f"expected sampling.temperature > 0, found {temperature}")
    if not logits.shape[:2] == targets.shape == mask.shape:
        raise ValueError(
            f"expected logits [B, S, V] with targets and mask [B, S], found {tuple(logits.shape)}, "
            f"{tuple(targets.shape)}, {tuple(mask.shape)}"
        )
    # The backward pass of index_select is several times faster than that of indexing with a mask.
    positions = mask.flatten().nonzero().squeeze(-1)
    selected = logits.flatten(0, 1).index_select(0, positions)
    if selected.dtype != torch.float64:
        selected = selected.float()
    if isinstance(temperature, Tensor):
        selected = selected / temperature.to(selected).unsqueeze(-1)
    elif temperature != 1:
        selected = selected / temperature
    distribution = torch.log_softmax(selected, dim=-1)
    chosen = targets.flatten().index_select(0, positions).unsqueeze(-1)
    logprobs = distribution.gather(-1, chosen).squeeze(-1)
    if entropy_at is None:
        return logprobs, logprobs.new_zeros(0)
    return logprobs, _entropy(distribution if entropy_gradient else distribution.detach(), entropy_at)


def _entropy(distribution: Tensor, at: Tensor) -> Tensor:
    """Compute the [M] entropies of [N, V] log-probabilities at [M] indices, chunk by chunk."""
    if len(at) < len(distribution):
        distribution = distribution.index_select(0, at)
    return torch.cat([_chunk_entropy(chunk) for chunk in torch.split(distribution, ENTROPY_CHUNK)])


def _chunk_entropy(distribution: Tensor) -> Tensor:
    if distribution.requires_grad:  # the derivative of entr is infinite at p = 0
        return -(distribution.exp() * distribution).sum(dim=-1)
    # entr(p) = -p log p is 0 at p = 0, where p * log p would be NaN.
    return torch.special.entr(distribution.exp()).sum(dim=-1)
