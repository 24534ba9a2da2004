"""Token by token beside a teacher's divergence: recalibration, a gate of confidence, entropy of uncertain tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learners.objective.distillation import LEAST_LOGPROB, with_rest


def recalibrated(teacher: Tensor, temperature: float) -> Tensor:
    """Return the K tokens of a teacher at another temperature; their probability together stays.

    q_k <- Q q_k^(1 / c) / sum_j q_j^(1 / c),   Q = sum_j q_j

    Args:
        teacher: [M, K] nats.
        temperature: c, > 0. The order of the tokens stays.

    Source: FIRST, arXiv:2408.12168, sec. 3.3 (temperature scaling of the teacher's 5 most probable tokens).
    """
    given = teacher.double().clamp(min=LEAST_LOGPROB)
    return (given / temperature).log_softmax(-1) + given.logsumexp(-1, keepdim=True)


def confidence_gate(logprobs: Tensor, teacher: Tensor) -> Tensor:
    """Return [M] sigmoid(H(p) - H(q)), over K tokens and the rest, without gradient.

    The divergence counts most where the policy is less certain than the teacher.

    Args:
        logprobs: [M, K] nats, of the teacher's tokens under the policy.
        teacher: [M, K] nats, of the same tokens under the teacher.

    Source: TSD-KD, arXiv:2603.13260, direct distillation.
    """
    return torch.sigmoid(_entropy(logprobs.detach()) - _entropy(teacher))


def uncertain_entropy(logprobs: Tensor, weights: Tensor, row_ids: Tensor, *, share: float) -> Tensor:
    """Compute the mean entropy of the policy on the tokens of each chain on which it is least certain.

    loss = sum_t in U w_t H_t n / |U|,   U: the share of the n tokens of each chain with the largest H, rounded up

    Args:
        logprobs: [M, K] nats, of the teacher's tokens under the policy; carries gradient.
        weights: [M], 1 / denominator of each token.
        row_ids: [M], chain of each token.
        share: in (0, 1].

    Source: TSD-KD, arXiv:2603.13260, entropy regularisation.
    """
    entropy = _entropy(logprobs)
    chosen = torch.zeros_like(entropy)
    for row in row_ids.unique().tolist():
        at = (row_ids == row).nonzero().squeeze(-1)
        count = math.ceil(round(len(at) * share, 9))  # 30 * 0.1 is a little above 3
        # A stable sort, so that equal entropies give the same tokens on all machines.
        largest = entropy.detach()[at].argsort(descending=True, stable=True)[:count]
        chosen[at[largest]] = len(at) / count
    return (weights * chosen * entropy).sum()


def _entropy(logprobs: Tensor) -> Tensor:
    """Return the [M] entropies over K tokens and the rest."""
    whole = with_rest(logprobs)
    return -(whole.exp() * whole).sum(-1)
