"""The clipped surrogate and the supervised loss against hand-made numbers and closed-form gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors64 import metrics_of, t64

from learners.objective.losses import policy_loss, supervised_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def test_policy_loss_by_hand():
    # bounds [0.8, 1.28]; term = -min(r A, clip(r) A)
    #  r    A    w     r A   clip(r) A   w * term        gradient -w r A, 0 where clipped
    #  1    2   1/2    2       2         -1              -1
    #  1.5  1   1/4    1.5     1.28      -0.32            0      (clipped high)
    #  0.5 -1   1     -0.5    -0.8       +0.8             0      (clipped low)
    #  0.5  1   1      0.5     0.8       -0.5            -0.5
    #  1.5 -1   1     -1.5    -1.28      +1.5            +1.5
    # sum: -1 - 0.32 + 0.8 - 0.5 + 1.5 = 0.48
    old = t64([-1.0, -2.0, -3.0, -0.5, -0.7])
    logprobs = (old + torch.log(t64([1.0, 1.5, 0.5, 0.5, 1.5]))).requires_grad_()
    out = policy_loss(logprobs, old, t64([2, 1, -1, 1, -1]), t64([0.5, 0.25, 1, 1, 1]), **CLIP)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.48, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx([-1, 0, 0, -0.5, 1.5], rel=1e-12, abs=0)
    assert metrics_of(out) == pytest.approx({"clipped_low": 1, "clipped_high": 1, "ratio_max": 1.5}, rel=1e-12)


def test_dual_clip_by_hand():
    # bounds [0.8, 1.28], c = 3; term = -min(r A, clip(r) A), and at most -c A where A < 0
    #  r    A    w     r A   clip(r) A   -c A   w * term   gradient
    #  5   -1   1     -5      -1.28       3     +3          0          (dual clip)
    #  2   -2   1/2   -4      -2.56       6     +2         -w r A = 2
    #  0.5 -1   1     -0.5    -0.8        3     +0.8        0          (clipped low)
    #  5    1   1      5       1.28       -     -1.28       0          (clipped high; A > 0 has no third bound)
    # sum: 3 + 2 + 0.8 - 1.28 = 4.52
    old = t64([-6.0, -2.0, -3.0, -4.0])
    logprobs = (old + torch.log(t64([5.0, 2.0, 0.5, 5.0]))).requires_grad_()
    out = policy_loss(logprobs, old, t64([-1, -2, -1, 1]), t64([1, 0.5, 1, 1]), **CLIP, dual_clip=3.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(4.52, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx([0, 2, 0, 0], rel=1e-12, abs=0)
    assert metrics_of(out) == pytest.approx(
        {"clipped_low": 1, "clipped_high": 1, "dual_clipped": 1, "ratio_max": 5}, rel=1e-12
    )


@pytest.mark.parametrize("bound", [1.0, 0.3, math.nan])
def test_dual_clip_below_the_ratio_one_is_refused(bound):
    with pytest.raises(ValueError, match="dual_clip > 1"):
        policy_loss(t64([0]), t64([0]), t64([-1]), t64([1]), **CLIP, dual_clip=bound)


def away_from_bounds(shift: float) -> bool:
    return min(abs(math.exp(shift) - bound) for bound in (0.8, 1.28, 3.0)) > 1e-6


tokens = st.lists(
    st.tuples(st.floats(-1.5, 1.5).filter(away_from_bounds), st.floats(-3, 3), st.floats(0, 2)),
    min_size=1,
    max_size=8,
)


@given(tokens=tokens, dual_clip=st.sampled_from([None, 3.0]))
def test_policy_gradient_closed_form(tokens, dual_clip):
    shift, advantages, weights = (list(column) for column in zip(*tokens, strict=True))
    old = t64([-2.0] * len(tokens))
    logprobs = (old + t64(shift)).requires_grad_()
    out = policy_loss(logprobs, old, t64(advantages), t64(weights), **CLIP, dual_clip=dual_clip)
    out.loss.backward()

    def is_flat(ratio: float, advantage: float) -> bool:
        if advantage > 0:
            return ratio > 1.28
        return advantage < 0 and (ratio < 0.8 or (dual_clip is not None and ratio > dual_clip))

    expected = [0.0 if is_flat(math.exp(d), a) else -w * math.exp(d) * a for d, a, w in tokens]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@given(tokens=tokens, clip=st.sampled_from([(0.0, 0.0), (0.2, 0.28), (0.9, 5.0)]))
def test_at_ratio_one_the_gradient_is_reinforce(tokens, clip):
    # REINFORCE: loss = -sum w A log p, gradient -w A, whatever the clip range
    _, advantages, weights = (list(column) for column in zip(*tokens, strict=True))
    logprobs = t64([-1.3] * len(tokens), grad=True)
    out = policy_loss(logprobs, logprobs.detach(), t64(advantages), t64(weights), clip_low=clip[0], clip_high=clip[1])
    out.loss.backward()
    expected = [-w * a for a, w in zip(advantages, weights, strict=True)]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)  # subnormals round
    assert out.metrics["clipped_low"].item() == out.metrics["clipped_high"].item() == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_descent_moves_probability_with_the_advantage(advantage):
    # three actions, one sample of action 0; a flipped sign of the loss moves its probability the other way
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(logits, dim=0)[:1]
    policy_loss(logprobs, logprobs.detach(), t64([advantage]), t64([1.0]), **CLIP).loss.backward()
    moved = torch.softmax(logits - 0.1 * logits.grad, dim=0)[0].item()
    assert (moved > 1 / 3) == (advantage > 0)
    assert abs(moved - 1 / 3) > 1e-3


@pytest.mark.parametrize("gap", [-500.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_ratios_stay_finite(gap, advantage):
    # exp(500) is infinite in fp32, and infinity times a masked-out 0 would be NaN in the gradient
    logprobs = torch.tensor([gap], requires_grad=True)
    out = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), **CLIP)
    out.loss.backward()
    assert out.loss.isfinite()
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("column", range(3))
def test_nan_is_not_hidden(column):
    values = [torch.zeros(2) for _ in range(3)]
    values[column][1] = math.nan
    assert policy_loss(*values, torch.ones(2), **CLIP).loss.isnan()


def test_supervised_by_hand():
    # 0.5 * 1 + 0.25 * 2 = 1; gradient -w
    logprobs = t64([-1.0, -2.0], grad=True)
    out = supervised_loss(logprobs, t64([0.5, 0.25]))
    out.loss.backward()
    assert out.loss.item() == 1.0
    assert logprobs.grad.tolist() == [-0.5, -0.25]
