"""Log-probabilities of given tokens under the policy, with the same definition as in the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learners.objective.curiosity import softened_logprobs


@dataclass(frozen=True, slots=True)
class OtherTokens:
    """Tokens other than the targets, whose log-probabilities are wanted.

    Attributes:
        rows: [P] int64, numbers of targets, each once.
        ids: [P, K] int64, the K tokens that could stand in the place of each of them.
    """

    rows: Tensor
    ids: Tensor

    def select(self, numbers: Tensor) -> OtherTokens:
        """Return the tokens of those targets that are among ascending numbers, [n] int64."""
        inside = torch.isin(self.rows, numbers)
        return OtherTokens(torch.searchsorted(numbers, self.rows[inside]), self.ids[inside])


def token_logprobs(
    logits: Tensor,
    target_ids: Tensor,
    temperature: Tensor,
    *,
    entropy_at: Tensor | None = None,
    entropy_gradient: bool = False,
    others: OtherTokens | None = None,
    softened_at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute log p(target), and at subsets of the positions the entropy, log p of other tokens, and log p~(target).

    p = softmax(logits / temperature);   entropy = -sum_v p_v log p_v

    The sampler reports log-probabilities after the temperature, so the learner must divide by the same temperature.
    Half-precision logits are raised to fp32 before the division, as in the sampler.

    Args:
        logits: [N, V], any float dtype; carries gradient.
        target_ids: [N] int64.
        temperature: [N], > 0.
        entropy_at: [N] bool, M of them True: where the entropy is computed. None computes no entropy.
        entropy_gradient: whether the entropy carries gradient.
        others: the other tokens; None for none.
        softened_at: [N] bool, S of them True: where `softened_logprobs` are computed; None computes none.

    Returns:
        logprobs: [N] nats, fp32 (fp64 for fp64 logits); carries gradient, also for N = 0.
        entropy: [M] nats; carries gradient with `entropy_gradient`.
        others: [P, K] nats, of the other tokens; carries gradient. [0, 1] without any.
        softened: [S] nats, of the policy at a temperature of each token.

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
    if not bool((temperature == 1).all()):
        logits = logits / temperature.to(logits).unsqueeze(-1)
    if entropy_at is None:
        entropy_at = torch.zeros_like(target_ids, dtype=torch.bool)
    rows = entropy_at.nonzero().squeeze(-1)
    if others is None:
        others = OtherTokens(rows.new_zeros(0), rows.new_zeros((0, 1)))
    soft = rows.new_zeros(0) if softened_at is None else softened_at.nonzero().squeeze(-1)
    logprobs, entropy, at_others, softened = _LogProbabilities.apply(
        logits, target_ids, rows, others.rows, others.ids, soft
    )
    return logprobs, entropy if entropy_gradient else entropy.detach(), at_others, softened


class _LogProbabilities(torch.autograd.Function):
    """Log-probabilities and entropies of softmax(logits), with the closed forms of their gradients.

    d log p_y / d logit_v = [v = y] - p_v;   d entropy / d logit_v = -p_v (log p_v + entropy)

    The derivatives of torch's own functions would pass over several more arrays of the size of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target_ids: Tensor, rows: Tensor, other_rows: Tensor, other_ids: Tensor, soft: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log-probabilities: [N] of targets, [P, K] of others, [S] softened; and the [M] entropies of rows."""
        distribution = torch.log_softmax(logits, dim=-1)
        entropy = _entropy(_rows(distribution, rows))
        ctx.save_for_backward(distribution, target_ids, rows, entropy, other_rows, other_ids)
        logprobs = distribution.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        softened = distribution.new_zeros(0)
        if len(soft):
            softened = softened_logprobs(_rows(distribution, soft), target_ids[soft])
        ctx.mark_non_differentiable(softened)
        return logprobs, entropy, distribution[other_rows.unsqueeze(-1), other_ids], softened

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Return the gradient of the logits; an output without gradient comes with zeros."""
        of_logprobs, of_entropy = (each.unsqueeze(-1) for each in gradients[:2])
        of_others = gradients[2]
        distribution, target_ids, rows, entropy, other_rows, other_ids = ctx.saved_tensors
        result = distribution.exp()
        if bool(of_entropy.any()):
            own, p = _rows(distribution, rows), _rows(result, rows)
            part = torch.where(p > 0, p * (own + entropy.unsqueeze(-1)), 0) * of_entropy
            result.mul_(-of_logprobs).index_add_(0, rows, -part)
        else:
            result.mul_(-of_logprobs)
        result.scatter_add_(-1, target_ids.unsqueeze(-1), of_logprobs)
        if len(other_rows):
            own = distribution[other_rows].exp_().mul_(-of_others.sum(-1, keepdim=True))
            result.index_add_(0, other_rows, own.scatter_add_(-1, other_ids, of_others))
        return result, None, None, None, None, None


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return chosen rows, without a copy if they are all."""
    return values if len(rows) == len(values) else values.index_select(0, rows)


def _entropy(distribution: Tensor) -> Tensor:
    """Compute the [M] entropies of [M, V] log-probabilities."""
    probabilities = distribution.exp()
    entropy = -torch.bmm(probabilities.unsqueeze(1), distribution.unsqueeze(2)).flatten()
    if bool(entropy.isfinite().all()):
        return entropy
    # entr(p) = -p log p is 0 at p = 0, where p * log p is NaN for a logit of -inf.
    return torch.special.entr(probabilities).sum(dim=-1)
