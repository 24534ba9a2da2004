"""A teacher that the learner itself holds: divergences over the whole vocabulary, a part of the targets at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learners.objective.distillation import LEAST_LOGPROB


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTeacher:
    """The teacher at P targets of a pass. Its logits exist for a part of the targets alone.

    Attributes:
        rows: [P] int64, numbers of targets, each once.
        states: [P, H], hidden states of the teacher that predict these targets.
        output_layer: from hidden states to logits, [P, V].
        beta, interpolation: see `divergence_loss`.
    """

    rows: Tensor
    states: Tensor
    output_layer: Callable[[Tensor], Tensor]
    beta: float
    interpolation: float

    def select(self, numbers: Tensor) -> WholeTeacher:
        """Return the teacher at those of its targets that are among ascending numbers, [n] int64."""
        inside = torch.isin(self.rows, numbers)
        rows = torch.searchsorted(numbers, self.rows[inside])
        return replace(self, rows=rows, states=self.states[inside])

    def divergences(self, logits: Tensor) -> Tensor:
        """Return the [P, 1] divergences of the policy from the teacher, nats, at temperature 1.

        Sizes of one model family fill up their vocabularies differently. Tokens that one model lacks are left out.

        Args:
            logits: [N, V] of the policy at all targets; carries gradient.
        """
        if logits.dtype != torch.float64:
            logits = logits.float()
        with torch.no_grad():
            of_teacher = self.output_layer(self.states).to(logits.dtype)
        shared = min(of_teacher.shape[-1], logits.shape[-1])
        own = logits if len(self.rows) == len(logits) else logits.index_select(0, self.rows)
        values: Tensor = _Divergence.apply(own[:, :shared], of_teacher[:, :shared], self.beta, self.interpolation)
        return values.unsqueeze(-1)


class _Divergence(torch.autograd.Function):
    """D_b of `divergence_loss` between distributions over all tokens, with the closed form of its gradient.

    dD_b / d logit_v = (1 - b) p_v (r_v - sum_u p_u r_u),   r = log p - log m,   for 0 < b < 1
    dD_1 / d logit_v = p_v (r_v - sum_u p_u r_u),   r = log p - log q;   dD_0 / d logit_v = p_v - q_v

    The derivatives of torch's own functions would keep and pass over several more arrays of the size of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, beta: float, interpolation: float) -> Tensor:
        """Return the [P] divergences, nats, of [P, V] logits of policy and teacher."""
        if not 0 <= beta <= 1:
            raise ValueError(f"expected objective.distill.beta in [0, 1], found {beta}")
        p = logits.log_softmax(-1).clamp_(min=LEAST_LOGPROB)
        q = teacher.log_softmax(-1).clamp_(min=LEAST_LOGPROB)
        if interpolation < 1:
            q = q.mul_(interpolation).add_(p, alpha=1 - interpolation).log_softmax(-1)
        of_policy = p.exp()
        if beta == 0:
            of_teacher = q.exp()
            values = _dot(of_teacher, q.sub_(p))
            gradient = of_policy.sub_(of_teacher)
        elif beta == 1:
            difference = p.sub_(q)
            values = _dot(of_policy, difference)
            gradient = of_policy.mul_(difference.sub_(values.unsqueeze(-1)))
        else:
            mixture = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
            difference = p.sub_(mixture)
            own = _dot(of_policy, difference)
            values = beta * _dot(q.exp(), q.sub(mixture)) + (1 - beta) * own
            gradient = of_policy.mul_(difference.sub_(own.unsqueeze(-1))).mul_(1 - beta)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].unsqueeze(-1), None, None, None


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Return the [P] inner products of the rows of two [P, V] arrays."""
    return torch.bmm(first.unsqueeze(1), second.unsqueeze(2)).flatten()
