"""Log-probabilities of given tokens under the policy, defined exactly as the sampler defines them."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of one entropy chunk; bounds the temporary [chunk, V] tensors.
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
    """log p(target) at the positions where the mask is True, and the entropy at those of them that ask for it.

    p = softmax(logits / temperature);   entropy = -sum_v p_v log p_v

    The sampler's processed log-probabilities are of the distribution after the temperature, so the learner
    must divide by the same temperature. Half-precision logits are raised to fp32 before the division, as
    the sampler does. Masked positions are dropped before anything of size V is computed.

    Args:
        logits: [B, S, V], any float dtype; carries gradient.
        targets: [B, S] int64, target of the logits at the same position.
        mask: [B, S] bool, N of them True.
        temperature: > 0, of all or [N], of every unmasked position.
        entropy_at: [M] int64, ascending places among the N whose entropy is wanted. None: of none, at no cost.
        entropy_gradient: whether the entropy is to be trained.

    Returns:
        logprobs: [N] nats, row-major order, fp32 (fp64 for fp64 logits); carries gradient, also for N = 0.
        entropy: [M] nats; carries gradient with entropy_gradient.

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
    # index_select: its backward pass is several times faster than that of indexing with a mask.
    kept = mask.flatten().nonzero().squeeze(-1)
    selected = logits.flatten(0, 1).index_select(0, kept)
    if selected.dtype != torch.float64:
        selected = selected.float()
    if isinstance(temperature, Tensor):
        selected = selected / temperature.to(selected).unsqueeze(-1)
    elif temperature != 1:
        selected = selected / temperature
    distribution = torch.log_softmax(selected, dim=-1)
    chosen = targets.flatten().index_select(0, kept).unsqueeze(-1)
    logprobs = distribution.gather(-1, chosen).squeeze(-1)
    if entropy_at is None:
        return logprobs, logprobs.new_zeros(0)
    return logprobs, _entropy(distribution if entropy_gradient else distribution.detach(), entropy_at)


def _entropy(distribution: Tensor, at: Tensor) -> Tensor:
    """[N, V] log-probabilities and [M] places -> [M] entropies, a chunk at a time."""
    if len(at) < len(distribution):
        distribution = distribution.index_select(0, at)
    return torch.cat([_chunk_entropy(chunk) for chunk in torch.split(distribution, ENTROPY_CHUNK)])


def _chunk_entropy(distribution: Tensor) -> Tensor:
    if distribution.requires_grad:  # the derivative of entr is infinite at p = 0
        return -(distribution.exp() * distribution).sum(dim=-1)
    # entr(p) = -p log p is 0 at p = 0, where p * log p would be NaN.
    return torch.special.entr(distribution.exp()).sum(dim=-1)
