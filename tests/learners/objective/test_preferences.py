"""Preference losses by hand, their optimum, and the effect of masking the shared prefix of a pair."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors64 import metrics_of, t64
from torch import Tensor

from learners.objective.joint import preference_term
from learners.objective.logprobs import token_logprobs
from learners.objective.losses import LossOutput
from learners.objective.preferences import adaptive_smoothing, pair_scores, preference_loss
from learners.samples.batching import PairTargets
from rlsys.config.objective import PreferenceConfig

# --- the losses ---


def test_dpo_by_hand():
    # beta 0.5
    #  d           z = beta d  eps   -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)                  w
    #  2 - 0       1           0.1   0.9 * 0.31326168751822286 + 0.1 * 1.3132616875182228 = 0.4132616875182228    1/2
    #  1 - 3       -1          0     1.3132616875182228                                                           1/4
    #  0.5 - 0.5   0           0.3   log 2 = 0.6931471805599453                                                   2
    # loss: 0.2066308437591114 + 0.3283154218795557 + 1.3862943611198906 = 1.9212406267585577
    # d loss / d d = w beta (sigmoid(z) - (1 - eps)), sigmoid(1) = 0.7310585786300049:
    #  0.25 * (0.7310585786300049 - 0.9), 0.125 * (0.2689414213699951 - 1), 1 * (0.5 - 0.7)
    gradient = [-0.04223535534249878, -0.09138232232875061, -0.2]
    chosen, rejected = t64([2.0, 1.0, 0.5], grad=True), t64([0.0, 3.0, 0.5], grad=True)
    smoothing = t64([0.1, 0.0, 0.3])
    out = preference_loss(chosen, rejected, t64([0.5, 0.25, 2]), loss="dpo", beta=0.5, label_smoothing=smoothing)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(1.9212406267585577, rel=1e-12)
    assert chosen.grad.tolist() == pytest.approx(gradient, rel=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-value for value in gradient], rel=1e-12)
    # a tie is no success
    assert metrics_of(out) == {"accuracy": 1, "margin": 0.0, "chosen_logratio": 3.5, "rejected_logratio": 3.5}


def test_ipo_by_hand():
    # beta 0.5: target 1 / (2 beta) = 1; d = 3 and -1: (3 - 1)^2 = 4, (-1 - 1)^2 = 4; w 1/2 and 1/4: 2 + 1 = 3
    # gradient 2 w (d - 1): 2, -1
    chosen = t64([3.5, -1.0], grad=True)
    zeros = t64([0, 0])
    out = preference_loss(chosen, t64([0.5, 0]), t64([0.5, 0.25]), loss="ipo", beta=0.5, label_smoothing=zeros)
    out.loss.backward()
    assert out.loss.item() == 3.0
    assert chosen.grad.tolist() == [2.0, -1.0]
    assert metrics_of(out) == {"accuracy": 1, "margin": 2.0, "chosen_logratio": 2.5, "rejected_logratio": 0.5}


def dpo_of(margin: float, smoothing: float, beta: float = 1.0) -> tuple[float, float]:
    """Return the loss of one pair and its derivative with respect to the margin."""
    chosen = t64([margin], grad=True)
    loss = preference_loss(chosen, t64([0.0]), t64([1.0]), loss="dpo", beta=beta, label_smoothing=t64([smoothing])).loss
    loss.backward()
    return loss.item(), chosen.grad.item()


@given(margin=st.floats(-30, 30), beta=st.floats(0.05, 2))
def test_conservative_dpo_without_smoothing_is_dpo(margin, beta):
    # -log sigmoid(z) = log(1 + e^-z), gradient -beta sigmoid(-z)
    loss, gradient = dpo_of(margin, 0.0, beta)
    assert loss == pytest.approx(math.log1p(math.exp(-beta * margin)), rel=1e-12)
    assert gradient == pytest.approx(-beta / (1 + math.exp(beta * margin)), rel=1e-12)


@given(margin=st.floats(-10, 10), smoothing=st.floats(0, 0.49), beta=st.floats(0.05, 2))
def test_conservative_gradient_closed_form(margin, smoothing, beta):
    sigmoid = 1 / (1 + math.exp(-beta * margin))
    expected = beta * (sigmoid - (1 - smoothing))
    assert dpo_of(margin, smoothing, beta)[1] == pytest.approx(expected, rel=1e-9, abs=1e-14)


@given(smoothing=st.floats(0.001, 0.45))
def test_conservative_optimum_is_the_logit(smoothing):
    optimum = math.log((1 - smoothing) / smoothing)
    loss, gradient = dpo_of(optimum, smoothing)
    assert abs(gradient) < 1e-12
    assert dpo_of(optimum - 0.1, smoothing)[1] < 0 < dpo_of(optimum + 0.1, smoothing)[1]
    assert loss < min(dpo_of(optimum - 0.1, smoothing)[0], dpo_of(optimum + 0.1, smoothing)[0])


def test_plain_dpo_has_no_finite_optimum():
    assert all(dpo_of(margin, 0.0)[1] < 0 for margin in (-5.0, 0.0, 5.0, 30.0))


def test_extreme_margins_stay_finite():
    for margin in (-1e4, 1e4):
        assert all(math.isfinite(value) for value in dpo_of(margin, 0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": t64([0.5])}, "label_smoothing in"),
        ({"label_smoothing": t64([-0.1])}, "label_smoothing in"),
        ({"label_smoothing": t64([math.nan])}, "label_smoothing in"),
        ({"label_smoothing": t64([0.1]), "loss": "ipo"}, "label_smoothing 0"),
        ({"beta": 0.0}, "beta > 0"),
        ({"beta": math.nan}, "beta > 0"),
        ({"loss": "hinge"}, "dpo or ipo"),
    ],
)
def test_bad_settings_are_refused(change, message):
    settings = {"loss": "dpo", "beta": 0.1, "label_smoothing": t64([0.0])}
    with pytest.raises(ValueError, match=message):
        preference_loss(t64([1]), t64([0]), t64([1]), **(settings | change))


# --- scores ---


def test_scores_by_hand():
    # segment 0: -1 - 3 = -4; segment 1: -0.5; segment 2: no targets; segment 3: -2 - 1 - 0 = -3
    logprobs = t64([-1, -2, -0.5, -3, -1, 0], grad=True)
    segments = torch.tensor([0, 3, 1, 0, 3, 3])
    scores = pair_scores(logprobs, segments, 4)
    assert scores.tolist() == [-4.0, -0.5, 0.0, -3.0]
    # the gradient of a target is the gradient of its own segment
    (scores * t64([1, 10, 100, 1000])).sum().backward()
    assert logprobs.grad.tolist() == [1, 1000, 10, 1, 1000, 1000]


@pytest.mark.parametrize("length_norm", [False, True])
def test_scores_of_nothing(length_norm):
    empty = t64([], grad=True)
    assert pair_scores(empty, torch.tensor([], dtype=torch.int64), 2).tolist() == [0.0, 0.0]
    out = pair_loss(empty, torch.tensor([], dtype=torch.int64), ("dpo", length_norm, 0.0))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-12)


def test_long_sums_in_fp32_do_not_drift():
    # 20000 terms of about -2: a running fp32 sum near -40000 rounds each of them to 1/512
    generator = torch.Generator().manual_seed(0)
    logprobs = -4 * torch.rand(20_000, generator=generator)
    score = pair_scores(logprobs, torch.zeros(20_000, dtype=torch.int64), 1)
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(math.fsum(logprobs.tolist()), rel=1e-7)


# --- masking the shared prefix ---

Form = tuple[Literal["dpo", "ipo"], bool, float]  # loss, length_norm, label smoothing
SUMMED: list[Form] = [("dpo", False, 0.0), ("dpo", False, 0.2), ("ipo", False, 0.0)]
NORMALISED: list[Form] = [("dpo", True, 0.0), ("dpo", True, 0.2), ("ipo", True, 0.0)]


def pair_loss(logratios: Tensor, segments: Tensor, form: Form) -> LossOutput:
    """One pair; segment 0 is the chosen completion, 1 the rejected one."""
    loss, length_norm, smoothing = form
    pair = PairTargets(
        positions=torch.arange(len(logratios)),
        segments=segments,
        reference=t64([0, 0]),
        smoothing=t64([smoothing]),
        weights=t64([1]),
    )
    return preference_term(logratios, pair, PreferenceConfig(loss=loss, beta=0.3, length_norm=length_norm))


def without_prefix(form: Form) -> list[tuple[float, list[float]]]:
    """Return loss and gradient, with and without the shared prefix, for the log-ratios of the differing tokens."""
    shared, chosen, rejected = [0.4, -0.2, 0.9], [0.5, -0.1], [-0.3, 0.2, 0.1, -0.6]
    results = []
    for prefix in (shared, []):
        logratios = t64([*prefix, *chosen, *prefix, *rejected], grad=True)
        segments = torch.tensor([0] * len(prefix + chosen) + [1] * len(prefix + rejected))
        out = pair_loss(logratios, segments, form)
        out.loss.backward()
        k = len(prefix)
        gradient = logratios.grad.tolist()
        results.append((out.loss.item(), gradient[k : k + 2] + gradient[2 * k + 2 :]))
    return results


@pytest.mark.parametrize("form", SUMMED)
def test_a_shared_prefix_cancels_in_summed_losses(form):
    (whole, whole_gradient), (masked, masked_gradient) = without_prefix(form)
    assert masked == pytest.approx(whole, rel=1e-12)
    assert masked_gradient == pytest.approx(whole_gradient, rel=1e-12)


@pytest.mark.parametrize("form", NORMALISED)
def test_a_shared_prefix_counts_in_normalised_losses(form):
    (whole, whole_gradient), (masked, masked_gradient) = without_prefix(form)
    assert abs(masked - whole) > 1e-3
    assert max(abs(a - b) for a, b in zip(whole_gradient, masked_gradient, strict=True)) > 1e-3


PREFIX = [5, 9, 3, 7]
CHOSEN, REJECTED = [1, 2, 8], [4, 4, 6, 10, 2]
PROMPT = [11, 12]


def tiny_model(seed: int) -> torch.nn.Module:
    """A GPT-2: unlike Qwen2's, its norms and attention stay in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    size = {"vocab_size": 16, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    noise = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**size, **noise, attn_implementation="sdpa")).double()


def model_loss(policy: torch.nn.Module, reference: torch.nn.Module, form: Form, masked: int) -> Tensor:
    """Return the loss of one pair without `masked` tokens of the shared prefix; the policy holds its gradient."""
    rows = [PROMPT + PREFIX + completion for completion in (CHOSEN, REJECTED)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    targets, positions = ids[:, 1:], torch.arange(1, width)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (positions >= len(PROMPT) + masked) & (positions < lengths[:, None])
    ones = torch.ones(int(mask.sum()))
    logprobs, *_ = token_logprobs(policy(input_ids=ids).logits[:, :-1][mask], targets[mask], ones)
    with torch.no_grad():
        frozen, *_ = token_logprobs(reference(input_ids=ids).logits[:, :-1][mask], targets[mask], ones)
    policy.zero_grad()
    loss = pair_loss(logprobs - frozen, mask.nonzero()[:, 0], form).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("form", SUMMED + NORMALISED)
def test_masking_the_prefix_through_a_model(form):
    policy, reference = tiny_model(0), tiny_model(1)
    results = []
    for masked in (0, len(PREFIX)):
        loss = model_loss(policy, reference, form, masked)
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        results.append((loss.item(), gradient.clone()))
    (whole, whole_gradient), (part, part_gradient) = results
    size = whole_gradient.norm().item()
    difference = (whole_gradient - part_gradient).norm().item()
    assert size > 1e-2
    if form in SUMMED:
        assert part == pytest.approx(whole, rel=1e-12)
        assert difference < 1e-12 * size
    else:
        assert abs(part - whole) > 1e-4
        assert difference > 1e-2 * size


def test_masking_one_token_too_many_changes_the_summed_loss():
    # the first differing token keeps its log-probability
    policy, reference = tiny_model(0), tiny_model(1)
    losses = [model_loss(policy, reference, SUMMED[0], masked).item() for masked in (len(PREFIX), len(PREFIX) + 1)]
    assert abs(losses[0] - losses[1]) > 1e-4


# --- adaptive smoothing ---


def test_adaptive_smoothing_by_hand():
    # q_w, q_l: c = 1 / (1 + q_l / max(1, q_w)), eps = min(1 - c, 0.499)
    #  4, 1: c = 1 / 1.25 = 0.8, eps 0.2       3, 1: c = 0.75, eps 0.25      0, 0: c = 1, eps 0
    #  0, 1: c = 1/2, eps 0.499                1, 9: c = 0.1, eps 0.499      5, 0: eps 0
    smoothing = adaptive_smoothing(np.array([4, 3, 0, 0, 1, 5.0]), np.array([1, 1, 0, 1, 9, 0.0]))
    assert smoothing.dtype == np.float64
    assert smoothing.tolist() == pytest.approx([0.2, 0.25, 0, 0.499, 0.499, 0], rel=1e-12, abs=0)


@given(chosen=st.integers(0, 1000), rejected=st.integers(0, 1000))
def test_adaptive_smoothing_is_bounded_and_grows_with_doubt(chosen, rejected):
    here, more, less = adaptive_smoothing(
        np.array([chosen, chosen, chosen + 1.0]), np.array([rejected, rejected + 1.0, rejected])
    )
    assert 0 <= less <= here <= more <= 0.499
    confidence = 1 / (1 + rejected / max(1, chosen))
    assert here == pytest.approx(min(1 - confidence, 0.499), rel=1e-9, abs=1e-12)
    # the loss accepts every value that it returns
    dpo_of(1.0, float(here))


def test_bad_visits_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        adaptive_smoothing(np.ones(2), np.ones(3))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="visits >= 0"):
            adaptive_smoothing(np.array([bad]), np.ones(1))
