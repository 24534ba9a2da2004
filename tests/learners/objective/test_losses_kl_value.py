"""KL estimators, entropy and value loss against hand-made numbers and closed-form gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors64 import metrics_of, t64

from learners.objective.losses import entropy_loss, kl_estimate, kl_loss, value_loss

LN2 = math.log(2)
ESTIMATORS = ("k1", "k2", "k3")


@pytest.mark.parametrize(
    ("estimator", "loss", "gradient", "kl"),
    [
        # d = ln 2 with weight 3 and d = -ln 2 with weight 2
        # k1: -d = -ln 2 and ln 2; -3 ln 2 + 2 ln 2 = -ln 2; gradient w; sum 0
        ("k1", -LN2, [3, 2], 0),
        # k2: d^2 / 2 = 0.2402265069591007 both; 5 times that = 1.2011325347955035; gradient -w d
        ("k2", 1.2011325347955035, [-3 * LN2, 2 * LN2], 0.4804530139182014),
        # k3: 2 - 1 - ln 2 = 0.3068528194400547, gradient 3 (1 - 2); 1/2 - 1 + ln 2 = 0.1931471805599453, gradient
        #     2 (1 - 1/2); 0.9205584583201641 + 0.3862943611198906 = 1.3068528194400547; their sum is exactly 1/2
        ("k3", 1.3068528194400547, [-3, 1], 0.5),
    ],
)
def test_kl_by_hand(estimator, loss, gradient, kl):
    logprobs = t64([-2.0, -1.0], grad=True)
    out = kl_loss(logprobs, t64([-2.0 + LN2, -1.0 - LN2]), t64([3.0, 2.0]), estimator=estimator)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-12)
    assert metrics_of(out) == pytest.approx({"kl": kl}, rel=1e-12, abs=1e-15)


# k3 is at most 10: exp(d) - 1 - d = 10 at d = 2.6102 and at d = -11 + 1.67e-5
K3_RANGE = (-11 + 2e-5, 2.61)


@given(gap=st.floats(*K3_RANGE), weight=st.floats(0.01, 5))
def test_kl_gradients_closed_form(gap, weight):
    rounded = (-1.0 + gap) - -1.0
    closed = {"k1": weight, "k2": -weight * rounded, "k3": -weight * math.expm1(rounded)}
    for estimator in ESTIMATORS:
        logprobs = t64([-1.0], grad=True)
        out = kl_loss(logprobs, t64([-1.0 + gap]), t64([weight]), estimator=estimator)
        out.loss.backward()
        assert logprobs.grad.item() == pytest.approx(closed[estimator], rel=1e-12, abs=1e-15)
        assert estimator == "k1" or out.loss.item() >= -1e-15


@pytest.mark.parametrize("gap", [2.62, 5.0, 10.0, 15.0, 19.0, 25.0, 800.0, -11.1, -15.0, -800.0])
def test_a_token_far_from_the_reference_has_the_largest_k3_and_no_gradient(gap):
    # Without the bound, the gradient is 1 - exp(d): -3.3e6 at d = 15, and infinite at d = 800.
    logprobs = t64([-1.0, -1.0], grad=True)
    out = kl_loss(logprobs, t64([-1.0 + gap, -1.0 - LN2]), t64([3.0, 2.0]), estimator="k3")
    out.loss.backward()
    assert out.loss.item() == pytest.approx(3 * 10 + 2 * (LN2 - 0.5), rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx([0.0, 1.0], rel=1e-12, abs=0)


def test_kl_estimators_in_expectation():
    # Samples from p, here as weights p, held fixed. Values: E[k1] = E[k3] = KL(p || q), k2 is biased.
    # Gradients as a loss: k1 none at all, since E_p[grad log p] = 0; k2 that of KL(p || q); k3 that of KL(q || p).
    logits = t64([0.4, -0.3, 1.1], grad=True)
    p, log_q = torch.log_softmax(logits, dim=0), torch.log(t64([0.6, 0.2, 0.2]))
    q = log_q.exp()
    forward, backward = (p.exp() * (p - log_q)).sum(), (q * (log_q - p)).sum()
    expected = {
        "k1": torch.zeros(3, dtype=torch.float64),
        "k2": torch.autograd.grad(forward, logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(backward, logits, retain_graph=True)[0],
    }
    for estimator in ESTIMATORS:
        loss = kl_loss(p, log_q, p.detach().exp(), estimator=estimator).loss
        gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        assert gradient.tolist() == pytest.approx(expected[estimator].tolist(), rel=1e-12, abs=1e-15)
        if estimator == "k2":
            assert abs(loss.item() - forward.item()) > 1e-2
        else:
            assert loss.item() == pytest.approx(forward.item(), rel=1e-12)


def test_kl_estimate_is_per_token():
    logprobs, reference = t64([-1.0, -2.0]), t64([-1.5, -2.0])
    assert kl_estimate(logprobs, reference, estimator="k1").tolist() == [0.5, 0.0]
    assert kl_estimate(logprobs, reference, estimator="k2").tolist() == [0.125, 0.0]
    assert kl_estimate(logprobs, reference, estimator="k3").tolist() == pytest.approx(
        [math.exp(-0.5) - 0.5, 0.0], rel=1e-12, abs=0
    )


def test_k3_of_a_token_the_policy_all_but_excludes_stays_finite():
    logprobs = torch.tensor([-500.0], requires_grad=True)
    out = kl_loss(logprobs, torch.zeros(1), torch.ones(1), estimator="k3")
    out.loss.backward()
    assert out.loss.isfinite()
    assert logprobs.grad.isfinite().all()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="kl.estimator"):
        kl_estimate(t64([0]), t64([0]), estimator="k4")


def test_entropy_by_hand():
    # -(1 * 0.5 + 0.25 * 2) = -1; gradient -w
    entropy = t64([0.5, 2.0], grad=True)
    out = entropy_loss(entropy, t64([1.0, 0.25]))
    out.loss.backward()
    assert out.loss.item() == -1.0
    assert entropy.grad.tolist() == [-1.0, -0.25]


def test_descent_on_the_entropy_loss_raises_entropy():
    logits = t64([2.0, 0.0, -1.0], grad=True)

    def entropy(values: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(torch.softmax(values, dim=0)).sum()[None]

    entropy_loss(entropy(logits), t64([1.0])).loss.backward()
    assert entropy(logits - 0.1 * logits.grad).item() > entropy(logits).item() + 1e-3


# V, V_old, R, weight
VALUES = ([1.0, 1.5, 1.5, 0.5], [0.9, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0], [1.0, 2.0, 1.0, 1.0])


def test_value_loss_by_hand():
    # clip 0.2; (V - R)^2 against (clip(V) - R)^2, the larger counts half; gradient w (V - R), 0 if the second does
    #  V    band        R   first  second  w * max / 2   gradient
    #  1    [0.7, 1.1]  2   1      1       0.5           -1
    #  1.5  [0.8, 1.2]  2   0.25   0.64    0.64           0     (left the band towards R)
    #  1.5  [0.8, 1.2]  0   2.25   1.44    1.125         +1.5   (left it away from R)
    #  0.5  [0.8, 1.2]  0   0.25   0.64    0.32           0
    # sum 2.585; squared errors 1 + 0.25 + 2.25 + 0.25 = 3.75
    values = t64(VALUES[0], grad=True)
    out = value_loss(values, *map(t64, VALUES[1:]), clip=0.2)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2.585, rel=1e-12)
    assert values.grad.tolist() == pytest.approx([-1, 0, 1.5, 0], rel=1e-12, abs=0)
    assert metrics_of(out) == pytest.approx({"value_clipped": 2, "squared_error": 3.75}, rel=1e-12)


@pytest.mark.parametrize("clip", [None, 100.0])
def test_value_loss_without_an_active_band(clip):
    # 0.5 (1 + 2 * 0.25 + 2.25 + 0.25) = 2
    values = t64(VALUES[0], grad=True)
    out = value_loss(values, *map(t64, VALUES[1:]), clip=clip)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2.0, rel=1e-12)
    assert values.grad.tolist() == pytest.approx([-1, -1, 1.5, 0.5], rel=1e-12)
    assert metrics_of(out) == pytest.approx({"value_clipped": 0, "squared_error": 3.75}, rel=1e-12)


@given(
    value=st.floats(-3, 3),
    old=st.floats(-3, 3),
    target=st.floats(-3, 3),
    weight=st.floats(0.1, 2),
    clip=st.floats(0.05, 1),
)
def test_value_gradient_closed_form(value, old, target, weight, clip):
    values = t64([value], grad=True)
    out = value_loss(values, t64([old]), t64([target]), t64([weight]), clip=clip)
    out.loss.backward()
    edge = float(np.clip(value, old - clip, old + clip))
    if abs(abs(value - target) - abs(edge - target)) < 1e-9 and value != edge:
        return  # a tie outside the band: the loss has a kink there
    flat = abs(edge - target) > abs(value - target)
    assert values.grad.item() == pytest.approx(0.0 if flat else weight * (value - target), rel=1e-12, abs=1e-15)
    assert metrics_of(out)["value_clipped"] == flat
