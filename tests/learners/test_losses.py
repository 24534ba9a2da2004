"""Losses against hand-made numbers and closed-form gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learners.losses import kl_loss, policy_loss, supervised_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def t64(values: list[float], *, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


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
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(
        {"clipped_low": 1, "clipped_high": 1, "ratio_max": 1.5}, rel=1e-12
    )
    assert not any(value.requires_grad for value in out.metrics.values())


tokens = st.lists(
    st.tuples(
        st.floats(-1.5, 1.5).filter(lambda d: min(abs(math.exp(d) - 0.8), abs(math.exp(d) - 1.28)) > 1e-6),
        st.floats(-3, 3),
        st.floats(0, 2),
    ),
    min_size=1,
    max_size=8,
)


@given(tokens=tokens)
def test_policy_gradient_closed_form(tokens):
    shift, advantages, weights = (list(column) for column in zip(*tokens, strict=True))
    old = t64([-2.0] * len(tokens))
    logprobs = (old + t64(shift)).requires_grad_()
    policy_loss(logprobs, old, t64(advantages), t64(weights), **CLIP).loss.backward()
    expected = [
        0.0 if (a > 0 and math.exp(d) > 1.28) or (a < 0 and math.exp(d) < 0.8) else -w * math.exp(d) * a
        for d, a, w in tokens
    ]
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


def test_losses_without_tokens_are_zero_and_differentiable():
    # a rank whose micro-batch is empty still runs backward
    logprobs = t64([], grad=True)
    empty = t64([])
    outputs = [
        policy_loss(logprobs, empty, empty, empty, **CLIP),
        kl_loss(logprobs, empty, empty, estimator="k3"),
        supervised_loss(logprobs, empty),
    ]
    for out in outputs:
        out.loss.backward()
        assert out.loss.item() == 0
        assert all(value.item() == 0 for value in out.metrics.values())


def test_kl_by_hand():
    # d = ln 2: 2 - 1 - ln 2 = 0.3068528194400547, gradient w (1 - 2) = -w
    # d = -ln 2: 1/2 - 1 + ln 2 = 0.1931471805599453, gradient w (1 - 1/2) = w / 2
    # weights 3 and 2: 0.9205584583201641 + 0.3862943611198906 = 1.3068528194400547
    logprobs = t64([-2.0, -1.0], grad=True)
    reference = t64([-2.0 + math.log(2), -1.0 - math.log(2)])
    out = kl_loss(logprobs, reference, t64([3.0, 2.0]), estimator="k3")
    out.loss.backward()
    assert out.loss.item() == pytest.approx(1.3068528194400547, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx([-3.0, 1.0], rel=1e-12)
    assert out.metrics["kl"].item() == pytest.approx(0.5, rel=1e-12)  # 0.30685... + 0.19314...


@given(gap=st.floats(-20, 20), weight=st.floats(0.01, 5))
def test_kl_is_not_negative_and_its_gradient_is_closed_form(gap, weight):
    logprobs = t64([-1.0], grad=True)
    out = kl_loss(logprobs, t64([-1.0 + gap]), t64([weight]), estimator="k3")
    out.loss.backward()
    assert out.loss.item() >= -1e-15
    rounded = (-1.0 + gap) - -1.0
    assert logprobs.grad.item() == pytest.approx(-weight * math.expm1(rounded), rel=1e-12, abs=1e-15)


def test_kl_estimator_has_the_expected_value():
    # E_p[q/p - 1 - log(q/p)] = sum q - sum p + sum p log(p/q) = KL(p || q): weights p make the loss that
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    loss = kl_loss(t64(list(np.log(p))), t64(list(np.log(q))), t64(list(p)), estimator="k3").loss.item()
    assert loss == pytest.approx((p * np.log(p / q)).sum(), rel=1e-12)


def test_supervised_by_hand():
    # 0.5 * 1 + 0.25 * 2 = 1; gradient -w
    logprobs = t64([-1.0, -2.0], grad=True)
    out = supervised_loss(logprobs, t64([0.5, 0.25]))
    out.loss.backward()
    assert out.loss.item() == 1.0
    assert logprobs.grad.tolist() == [-0.5, -0.25]
