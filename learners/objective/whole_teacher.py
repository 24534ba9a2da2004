"""A teacher that the learner itself holds: divergences over the whole vocabulary, a part of the targets at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learners.objective.distillation import divergences


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
        with torch.no_grad():
            of_teacher = self.output_layer(self.states)
            shared = min(of_teacher.shape[-1], logits.shape[-1])
            teacher = of_teacher[:, :shared].double().log_softmax(-1)
        policy = logits.index_select(0, self.rows)[:, :shared].double().log_softmax(-1)
        values = divergences(policy, teacher, beta=self.beta, interpolation=self.interpolation)
        return values.unsqueeze(-1).to(torch.promote_types(logits.dtype, torch.float32))
