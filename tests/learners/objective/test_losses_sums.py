"""What every loss has in common: partial losses add up, and a weight of 0 removes whatever is finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors64 import metrics_of, t64
from torch import Tensor

from learners.objective.losses import (
    LossOutput,
    cispo_loss,
    entropy_loss,
    gspo_loss,
    kl_loss,
    policy_loss,
    supervised_loss,
    value_loss,
)
from learners.objective.preferences import preference_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
ROWS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
SMOOTHING = t64([0.0, 0.1, 0.2, 0.3, 0.4, 0.0, 0.1, 0.2])

# name: a loss of x (which carries gradient), two more columns, weights, row numbers and label smoothing
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], LossOutput]
LOSSES: dict[str, Loss] = {
    "policy": lambda x, a, b, w, rows, eps: policy_loss(x, a, b, w, **CLIP),
    "dual clip": lambda x, a, b, w, rows, eps: policy_loss(x, a, b, w, **CLIP, dual_clip=1.5),
    "gspo": lambda x, a, b, w, rows, eps: gspo_loss(x, a, b, w, rows, **CLIP),
    "cispo": lambda x, a, b, w, rows, eps: cispo_loss(x, a, b, w, **CLIP),
    "k1": lambda x, a, b, w, rows, eps: kl_loss(x, a, w, estimator="k1"),
    "k2": lambda x, a, b, w, rows, eps: kl_loss(x, a, w, estimator="k2"),
    "k3": lambda x, a, b, w, rows, eps: kl_loss(x, a, w, estimator="k3"),
    "entropy": lambda x, a, b, w, rows, eps: entropy_loss(x, w),
    "value": lambda x, a, b, w, rows, eps: value_loss(x, a, b, w, clip=0.3),
    "supervised": lambda x, a, b, w, rows, eps: supervised_loss(x, w),
    "dpo": lambda x, a, b, w, rows, eps: preference_loss(x, a, w, loss="dpo", beta=0.5, label_smoothing=eps),
    "ipo": lambda x, a, b, w, rows, eps: preference_loss(x, a, w, loss="ipo", beta=0.5, label_smoothing=0 * eps),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def columns(seed: int) -> list[Tensor]:
    """x, two more columns and weights."""
    generator = torch.Generator().manual_seed(seed)
    x, a, b, w = (torch.randn(len(ROWS), dtype=torch.float64, generator=generator) for _ in range(4))
    return [x, x + 0.5 * a, b, w.abs()]


def evaluate(loss: Loss, values: list[Tensor], keep: Tensor) -> tuple[LossOutput, Tensor]:
    """Return the loss of the selected entries and its gradient, which is 0 at the others."""
    x = values[0].clone().requires_grad_()
    out = loss(*(column[keep] for column in (x, *values[1:], ROWS, SMOOTHING)))
    out.loss.backward()
    return out, x.grad


@every_loss
@given(parts=st.lists(st.integers(0, 2), min_size=4, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_partial_losses_add_up(loss, parts, seed):
    # rows go to micro-batches as a whole; some micro-batches stay empty
    values, part_of = columns(seed), torch.tensor(parts)[ROWS]
    whole, gradient = evaluate(loss, values, torch.arange(len(ROWS)))
    partial = [evaluate(loss, values, (part_of == part).nonzero().squeeze(-1)) for part in range(3)]
    assert sum(out.loss.item() for out, _ in partial) == pytest.approx(whole.loss.item(), rel=1e-12, abs=1e-14)
    assert sum(grad for _, grad in partial).tolist() == pytest.approx(gradient.tolist(), rel=1e-12, abs=1e-14)
    for name, total in metrics_of(whole).items():
        values = [metrics_of(out)[name] for out, _ in partial]
        combined = max(values) if name.endswith("_max") else math.fsum(values)
        assert combined == pytest.approx(total, rel=1e-12, abs=1e-14)


@every_loss
@pytest.mark.parametrize("garbage", [-1e4, -1.0, 1e4])
def test_garbage_of_weight_0_changes_nothing(loss, garbage):
    values = columns(0)
    padding = ROWS == 1
    values[3][padding] = 0.0
    clean, gradient = evaluate(loss, values, torch.arange(len(ROWS)))
    for column in range(3):
        values[column][padding] = garbage
        dirty, dirty_gradient = evaluate(loss, values, torch.arange(len(ROWS)))
        assert dirty.loss.item() == clean.loss.item()
        assert dirty_gradient.tolist() == gradient.tolist()
        assert dirty_gradient[padding].tolist() == [0.0, 0.0]


@every_loss
def test_nan_is_never_hidden(loss):
    # it must stop the run, also where its weight is 0: whatever made it may have made more
    values = columns(0)
    values[0][1], values[3][1] = math.nan, 0.0
    assert loss(*values, ROWS, SMOOTHING).loss.isnan()


@every_loss
def test_nothing_is_zero_and_differentiable(loss):
    # a rank whose micro-batch is empty still runs backward
    values = columns(0)
    out, gradient = evaluate(loss, values, torch.tensor([], dtype=torch.int64))
    assert out.loss.item() == 0
    assert gradient.tolist() == [0.0] * len(ROWS)
    assert set(metrics_of(out).values()) <= {0}
