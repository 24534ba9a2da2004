"""Sequence-level ratios (GSPO), clipped importance weights (CISPO) and off-policy importance weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors64 import metrics_of, t64

from learners.objective.joint import token_weights
from learners.objective.losses import cispo_loss, gspo_loss, importance_weights, policy_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
tokens = st.lists(
    st.tuples(st.floats(-30, 30), st.floats(-3, 3), st.floats(0, 2)),
    min_size=1,
    max_size=8,
)


def test_gspo_by_hand():
    # bounds [0.5, 2]; s = exp(mean log r); term = -min(s A, clip(s) A) for every target of the row
    # row   r         s               A    w          sum of w * term     gradient -w s A, 0 where clipped
    #  0    3, 0.75   sqrt 2.25 = 1.5  2   1/4, 1/4   -1/2 * 3    = -1.5  -0.75 each (3 alone would be clipped)
    #  1    16, 1     sqrt 16 = 4      1   1/4, 1/4   -1/2 * 2    = -1     0 each    (1 alone would not be clipped)
    #  2    0.25      0.25            -1   1          +0.5                 0
    #  5    4         4               -1   1          +4                  +4
    # sum: -1.5 - 1 + 0.5 + 4 = 2; the rows' targets are interleaved, and rows 3 and 4 have none
    rows = torch.tensor([0, 1, 5, 0, 2, 1])
    old = t64([-1.0, -4.0, -2.0, -3.0, -0.1, -0.5])
    logprobs = (old + torch.log(t64([3, 16, 4, 0.75, 0.25, 1]))).requires_grad_()
    advantages, weights = t64([2, 1, -1, 2, -1, 1]), t64([0.25, 0.25, 1, 0.25, 1, 0.25])
    out = gspo_loss(logprobs, old, advantages, weights, rows, clip_low=0.5, clip_high=1.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2.0, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx([-0.75, 0, 4, -0.75, 0, 0], rel=1e-12, abs=0)
    assert metrics_of(out) == pytest.approx({"clipped_low": 1, "clipped_high": 2, "ratio_max": 4}, rel=1e-12)


@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_gspo_is_the_sequence_form_in_value_and_gradient(seed, lengths):
    # -(1/n) sum_i min(s_i A_i, clip(s_i) A_i), differentiated through s_i by torch itself
    generator = torch.Generator().manual_seed(seed)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    old = torch.randn(len(rows), dtype=torch.float64, generator=generator) - 3
    start = old + 0.5 * torch.randn(len(rows), dtype=torch.float64, generator=generator)
    row_advantages = torch.randn(len(lengths), dtype=torch.float64, generator=generator)

    expected = start.clone().requires_grad_()
    gaps = torch.split(expected - old, lengths)
    ratios = torch.stack([gap.mean().exp() for gap in gaps])
    sequence_loss = -torch.minimum(ratios * row_advantages, ratios.clamp(0.8, 1.28) * row_advantages).mean()
    sequence_loss.backward()

    logprobs = start.clone().requires_grad_()
    weights = torch.from_numpy(token_weights(lengths, aggregation="sequence_mean", max_tokens=10))[rows]
    out = gspo_loss(logprobs, old, row_advantages[rows], weights, rows, **CLIP)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(sequence_loss.item(), rel=1e-12, abs=1e-15)
    assert logprobs.grad.tolist() == pytest.approx(expected.grad.tolist(), rel=1e-12, abs=1e-15)


@given(tokens=tokens)
def test_gspo_of_rows_of_one_target_is_the_token_surrogate(tokens):
    # beyond the bound of the log ratio (20) as well as inside
    shift, advantages, weights = (list(column) for column in zip(*tokens, strict=True))
    old, columns = t64([-2.0] * len(tokens)), (t64(advantages), t64(weights))
    first, second = ((old + t64(shift)).requires_grad_() for _ in range(2))
    sequence = gspo_loss(first, old, *columns, torch.arange(len(tokens)).flip(0), **CLIP)
    token = policy_loss(second, old, *columns, **CLIP)
    sequence.loss.backward()
    token.loss.backward()
    assert sequence.loss.item() == pytest.approx(token.loss.item(), rel=1e-12, abs=1e-300)
    assert first.grad.tolist() == pytest.approx(second.grad.tolist(), rel=1e-12, abs=1e-300)
    assert metrics_of(sequence) == pytest.approx(metrics_of(token), rel=1e-12)


def test_cispo_by_hand():
    # bounds [0.8, 1.28]; term = -clip(r) A log p
    #  r    A   w    log p   clip(r)   w * term                      gradient -w clip(r) A
    #  1.5  1   1/2   -1     1.28      -0.5 * 1.28 * 1 * -1 =  0.64   -0.64  (the clipped surrogate has 0 here)
    #  0.5 -1   1     -2     0.8       -0.8 * -1 * -2       = -1.6    +0.8   (and here)
    #  1.1  2   1     -0.5   1.1       -1.1 * 2 * -0.5      =  1.1    -2.2
    #  0.5  1   2     -1     0.8       -2 * 0.8 * -1        =  1.6    -1.6
    # sum: 0.64 - 1.6 + 1.1 + 1.6 = 1.74
    logprobs = t64([-1.0, -2.0, -0.5, -1.0], grad=True)
    old = logprobs.detach() - torch.log(t64([1.5, 0.5, 1.1, 0.5]))
    out = cispo_loss(logprobs, old, t64([1, -1, 2, 1]), t64([0.5, 1, 1, 2]), **CLIP)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(1.74, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx([-0.64, 0.8, -2.2, -1.6], rel=1e-12)
    assert metrics_of(out) == pytest.approx({"clipped_low": 2, "clipped_high": 1, "ratio_max": 1.5}, rel=1e-12)


@given(tokens=tokens, clip_low=st.sampled_from([0.2, 1.0]))
def test_cispo_gradient_closed_form_everywhere(tokens, clip_low):
    shift, advantages, weights = (list(column) for column in zip(*tokens, strict=True))
    old = t64([-2.0] * len(tokens))
    logprobs = (old + t64(shift)).requires_grad_()
    cispo_loss(logprobs, old, t64(advantages), t64(weights), clip_low=clip_low, clip_high=4.0).loss.backward()
    ratios = [math.exp(min(max(x, -20), 20)) for x in (logprobs.detach() - old).tolist()]
    expected = [-w * min(max(r, 1 - clip_low), 5.0) * a for r, (_, a, w) in zip(ratios, tokens, strict=True)]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@given(tokens=tokens)
def test_cispo_at_ratio_one_is_policy_gradient(tokens):
    _, advantages, weights = (list(column) for column in zip(*tokens, strict=True))
    logprobs = t64([-1.3] * len(tokens), grad=True)
    out = cispo_loss(logprobs, logprobs.detach(), t64(advantages), t64(weights), **CLIP)
    out.loss.backward()
    reinforce = [-w * a for a, w in zip(advantages, weights, strict=True)]
    assert logprobs.grad.tolist() == pytest.approx(reinforce, rel=1e-12, abs=1e-300)
    assert out.loss.item() == pytest.approx(-1.3 * math.fsum(reinforce), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("gap", [-500.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_ratios_stay_finite(gap, advantage):
    columns = (torch.zeros(1), torch.tensor([advantage]), torch.ones(1))
    for loss, extra in ((gspo_loss, (torch.zeros(1, dtype=torch.int64),)), (cispo_loss, ())):
        logprobs = torch.tensor([gap], requires_grad=True)
        out = loss(logprobs, *columns, *extra, **CLIP)
        out.loss.backward()
        assert out.loss.isfinite()
        assert logprobs.grad.isfinite().all()
    assert importance_weights(torch.tensor([gap]), torch.zeros(1), cap=1e30)[0].isfinite()


def test_importance_weights_by_hand():
    # rho = 3, 0.5, 1; cap 2: weights 2, 0.5, 1; sum of rho 4.5
    behavior = t64([-2.0, -1.0, -3.0], grad=True)
    old = (behavior.detach() + torch.log(t64([3, 0.5, 1]))).requires_grad_()
    weights, metrics = importance_weights(old, behavior, cap=2.0)
    assert weights.tolist() == pytest.approx([2, 0.5, 1], rel=1e-12)
    assert not weights.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"is_ratio_sum": 4.5, "is_ratio_max": 3, "is_truncated": 1}, rel=1e-12
    )


def test_importance_weights_without_tokens():
    weights, metrics = importance_weights(t64([]), t64([]), cap=2.0)
    assert weights.shape == (0,)
    assert all(value.item() == 0 for value in metrics.values())


@given(tokens=tokens)
def test_decoupled_loss_of_equal_policies_is_the_plain_one(tokens):
    shift, advantages, weights = (list(column) for column in zip(*tokens, strict=True))
    old = t64([-2.0] * len(tokens))
    first, second = ((old + t64(shift)).requires_grad_() for _ in range(2))
    correction, metrics = importance_weights(old, old.clone(), cap=2.0)
    assert metrics["is_ratio_sum"].item() == len(tokens)
    decoupled = policy_loss(first, old, t64(advantages), t64(weights) * correction, **CLIP).loss
    plain = policy_loss(second, old, t64(advantages), t64(weights), **CLIP).loss
    decoupled.backward()
    plain.backward()
    assert decoupled.item() == plain.item()
    assert first.grad.tolist() == second.grad.tolist()


def test_decoupled_loss_expects_over_the_old_policy_whatever_produced_the_tokens():
    # sum_a b(a) (o(a) / b(a)) l(a) = sum_a o(a) l(a), l the clipped term around o: the clip never sees b
    logits = t64([0.3, -0.2, 0.9], grad=True)
    old = torch.log(t64([0.5, 0.3, 0.2]))
    behavior = torch.log(t64([0.1, 0.2, 0.7]))
    advantages = t64([1.0, -2.0, 0.5])
    correction, _ = importance_weights(old, behavior, cap=1e9)
    losses = [
        policy_loss(torch.log_softmax(logits, dim=0), old, advantages, weights, **CLIP).loss
        for weights in (behavior.exp() * correction, old.exp())
    ]
    gradients = [torch.autograd.grad(loss, logits)[0].tolist() for loss in losses]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-12)
