"""Shared helpers of the tests of the losses: float64 tensors, and LossOutput as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learners.objective.losses import LossOutput


def t64(values: Sequence[float], *, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def metrics_of(out: LossOutput) -> dict[str, float]:
    """Return metrics as numbers. A metric with a gradient would keep the graph of a whole step alive."""
    assert not any(value.requires_grad for value in out.metrics.values())
    return {name: value.item() for name, value in out.metrics.items()}
