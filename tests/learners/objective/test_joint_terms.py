"""The policy term and the preference term of the joint loss by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from joint_samples import (
    floats,
    pair_item,
    planned,
    policy_sample,
    random_preferences,
    update,
)
from tensors64 import t64

from learners.objective.joint import joint_loss, weigh_items
from learners.objective.losses import LossOutput
from learners.samples.batching import collate
from learners.samples.types import PackItem
from rlsys.config.objective import ObjectiveConfig, PolicyConfig


def objective(policy: dict[str, Any] | None = None, **others: dict[str, Any]) -> ObjectiveConfig:
    return ObjectiveConfig(**{"kl": {"weight": 0.3}, "policy": policy or {}, **others})


# --- the policy term by hand ---


def policy_term(own: float, old: float | None, behavior: float, advantage: float, **settings: Any) -> tuple[Any, float]:
    """Return the output of the policy term and its gradient, for one token of weight 1."""
    figures = {} if old is None else {"old_logprobs": floats(0, old)}
    sample = policy_sample([1, 2], [0, 1], [0, advantage], behavior_logprobs=floats(0, behavior), **figures)
    items, _ = weigh_items([PackItem(samples=(sample,))], PolicyConfig(), 12)
    logprobs = t64([own], grad=True)
    output = joint_loss(logprobs, t64([0.5]), collate(items, 0), ObjectiveConfig(policy=settings))["policy"]
    output.loss.backward()
    return output, float(logprobs.grad)


def test_decoupled_and_coupled_ratios_by_hand():
    # own -1, old -1.125, behavior -2: decoupled r = e^0.125 = 1.1331 inside the bounds, weight e^0.875 = 2.3989 > 2.
    # loss = -2 * e^0.125 * 0.5, and its gradient is the same, for d r = r.
    output, gradient = policy_term(-1.0, -1.125, -2.0, 0.5)
    assert output.loss.item() == pytest.approx(-math.exp(0.125), rel=1e-7)
    assert gradient == pytest.approx(-math.exp(0.125), rel=1e-7)
    assert output.metrics["is_ratio_sum"].item() == pytest.approx(math.exp(0.875), rel=1e-7)
    assert output.metrics["is_truncated"].item() == 1
    assert output.metrics["gap"].item() == output.metrics["gap_max"].item() == 0.875
    # A larger cap leaves the whole weight; no cap means no importance weights.
    output, _ = policy_term(-1.0, -1.125, -2.0, 0.5, importance_cap=3.0)
    assert output.loss.item() == pytest.approx(-0.5 * math.exp(1.0), rel=1e-7)
    output, _ = policy_term(-1.0, -1.125, -2.0, 0.5, importance_cap=None)
    assert output.loss.item() == pytest.approx(-0.5 * math.exp(0.125), rel=1e-7)
    assert "is_ratio_sum" not in output.metrics
    # Coupled: r = e^1 = 2.718 is clipped to 1.28, without a gradient; A < 0 is not clipped from above.
    output, gradient = policy_term(-1.0, -1.125, -2.0, 0.5, decoupled=False)
    assert (output.loss.item(), gradient) == (pytest.approx(-0.64, rel=1e-12), 0.0)
    assert output.metrics["clipped_high"].item() == 1
    assert "is_ratio_sum" not in output.metrics
    assert output.metrics["gap"].item() == 0.875  # between learner and sampler, for either ratio
    output, gradient = policy_term(-1.0, -1.125, -2.0, -0.5, decoupled=False)
    assert gradient == pytest.approx(0.5 * math.e, rel=1e-7)


@pytest.mark.parametrize("surrogate", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("advantage", [0.5, -0.5])
@pytest.mark.parametrize("old", [-1.0, -1.125, -2.0, -0.5])
def test_decoupled_is_coupled_where_the_old_policy_sampled(old, advantage, surrogate):
    # The importance weight is e^0 = 1, and the ratio has the same denominator: 1, e^0.125, e^1 and e^-0.5, two of them
    # outside the bounds.
    settings = {"surrogate": surrogate, "entropy_coef": 0.25}
    (output, gradient), (coupled, expected) = (
        policy_term(-1.0, old, old, advantage, decoupled=decoupled, **settings) for decoupled in (True, False)
    )
    assert (output.loss.item(), gradient) == (coupled.loss.item(), expected)
    assert {name: output.metrics[name].item() for name in coupled.metrics} == {
        name: value.item() for name, value in coupled.metrics.items()
    }


def test_the_surrogate_is_the_configured_one_by_hand():
    # r = e^1 = 2.718 above 1.28. PPO's clip has no gradient there (above); CISPO's is -1.28 A, of -1.28 A * own.
    output, gradient = policy_term(-1.0, None, -2.0, 0.5, decoupled=False, surrogate="cispo")
    assert (output.loss.item(), gradient) == (pytest.approx(0.64, rel=1e-12), pytest.approx(-0.64, rel=1e-12))
    # A < 0: the loss -r A = e / 2 is bounded by -2 A = 1, without a gradient.
    output, gradient = policy_term(-1.0, None, -2.0, -0.5, decoupled=False, dual_clip=2.0)
    assert (output.loss.item(), gradient) == (pytest.approx(1.0, rel=1e-12), 0.0)
    assert output.metrics["dual_clipped"].item() == 1


def test_without_old_log_probabilities_the_current_policy_is_the_old_one():
    # r = 1 with a gradient; weight e^(2 - 1.5) = e^0.5.
    output, gradient = policy_term(-1.5, None, -2.0, 3.0)
    assert output.loss.item() == pytest.approx(-3 * math.exp(0.5), rel=1e-7)
    assert gradient == pytest.approx(-3 * math.exp(0.5), rel=1e-7)


def test_the_importance_weight_applies_only_to_the_policy_term():
    # Behavior far from old: weight e^2, capped at 2. It does not apply to KL and entropy bonus.
    sample = policy_sample(
        [1, 2],
        [0, 1],
        [0, 1],
        behavior_logprobs=floats(0, -3),
        old_logprobs=floats(0, -1),
        reference_logprobs=floats(0, -2),
    )
    items, _ = weigh_items([PackItem(samples=(sample,))], PolicyConfig(), 12)
    config = ObjectiveConfig(policy={"entropy_coef": 0.25}, kl={"weight": 1.0, "estimator": "k1"})
    terms = joint_loss(t64([-1.0]), t64([0.5]), collate(items, 0), config)
    assert terms["policy"].loss.item() == pytest.approx(-2 * 1 - 0.25 * 0.5, rel=1e-12)
    assert terms["kl"].loss.item() == pytest.approx(1.0, rel=1e-12)  # k1 = -(-2 + 1)


def test_gspo_weighs_the_row_as_a_whole():
    # Log-ratios 0.3 and -0.1 of one sample: s = e^0.1 for both its tokens; the other sample has its own, e^-0.2.
    samples = [
        policy_sample([1, 2, 3], [0, 1, 1], [0, 1, 1], old_logprobs=floats(0, -1.25, -0.75)),
        policy_sample([1, 2], [0, 1], [0, -1], old_logprobs=floats(0, -1)),
    ]
    policy = {
        "surrogate": "gspo",
        "aggregation": "sequence_mean",
        "importance_cap": None,
        "clip_low": 0.5,
        "clip_high": 0.5,
    }
    items, _ = weigh_items([PackItem(samples=(sample,)) for sample in samples], PolicyConfig(**policy), 12)
    logprobs = t64([-0.95, -0.85, -1.2], grad=True)
    output = joint_loss(logprobs, t64([0.0] * 3), collate(items, 0), ObjectiveConfig(policy=policy))["policy"]
    # -(1/2) (e^0.1 * 1) + (1/2) e^-0.2
    assert output.loss.item() == pytest.approx((-math.exp(0.1) + math.exp(-0.2)) / 2, rel=1e-7)
    output.loss.backward()
    # every token of sample 0: -s A / (n |o|) = -e^0.1 / 4
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.1) / 4] * 2 + [math.exp(-0.2) / 2], rel=1e-7)


# --- pairs ---


def both_ways(smoothing: float = 0.1, **preference: Any) -> list[tuple[dict[str, float], torch.Tensor]]:
    """Return the results of the preference term with and without the mask of the common prefix.

    Without the mask the reference scores include the prefix, with the same -1.5 for both sides.
    """
    config, results = objective(preference=preference), []
    for mask_prefix in (True, False):
        items = []
        for pair in random_preferences(6):
            extra = 0.0 if mask_prefix else -1.5
            scored = replace(
                pair, chosen_reference=pair.chosen_reference + extra, rejected_reference=pair.rejected_reference + extra
            )
            item = pair_item(scored, mask_prefix=mask_prefix, sft=False)
            assert item.pair is not None
            items.append(replace(item, pair=replace(item.pair, smoothing=smoothing)))
        results.append(update(items, config, weights={"preference": 1.0}, plan=planned(items, 2, 50)))
    return results


@pytest.mark.parametrize("settings", [{}, {"smoothing": 0.0}, {"smoothing": 0.0, "loss": "ipo"}])
def test_the_prefix_mask_changes_nothing_where_sums_are_compared(settings):
    (masked, gradient), (whole, whole_gradient) = both_ways(**settings)
    assert masked["preference"] == pytest.approx(whole["preference"], abs=1e-12)
    assert (gradient - whole_gradient).abs().max() < 1e-12
    assert gradient.abs().max() > 1e-3


def test_the_prefix_mask_changes_what_means_are():
    (masked, gradient), (whole, whole_gradient) = both_ways(length_norm=True)
    assert abs(masked["preference"] - whole["preference"]) > 1e-3
    assert (gradient - whole_gradient).abs().max() > 1e-4


def test_the_first_differing_token_keeps_its_log_probability():
    # Common prefix of 2 tokens and one of its own on each side: one target a side under the mask.
    (pair,) = random_preferences(1)
    items = [pair_item(pair, sft=False)]
    batch = collate(items, 0)
    assert batch.pairs is not None
    tails = [len(pair.chosen_ids) - pair.common, len(pair.rejected_ids) - pair.common]
    assert batch.pairs.segments.bincount().tolist() == tails
    assert batch.target_ids[0].item() == 3  # the first token of the chosen tail


def pair_term(smoothing: float, **preference: Any) -> tuple[LossOutput, list[float]]:
    """Return the output of the preference term and its gradient by the three targets, for one pair of weight 1.

    A common prefix of 1 token; the chosen side has 2 of its own, of -1 and -2, the rejected one 1, of -4. The reference
    policy gives both sides -3.5: log-ratios 0.5 and -0.5, d = 1.
    """
    (pair,) = random_preferences(1)
    pair = replace(
        pair,
        chosen_ids=np.array([1, 2, 3], dtype=np.int32),
        rejected_ids=np.array([1, 4], dtype=np.int32),
        prompt_length=1,
        common=1,
        chosen_reference=-3.5,
        rejected_reference=-3.5,
    )
    item = pair_item(pair, sft=False)
    assert item.pair is not None
    items, _ = weigh_items([replace(item, pair=replace(item.pair, smoothing=smoothing))], PolicyConfig(), 12)
    logprobs = t64([-1.0, -2.0, -4.0], grad=True)
    config = ObjectiveConfig(preference=preference)
    output = joint_loss(logprobs, t64([]), collate(items, 0), config)["preference"]
    output.loss.backward()
    return output, logprobs.grad.tolist()


def test_pair_losses_by_hand():
    # beta 0.5: z = 0.5.
    output, _ = pair_term(0.1, beta=0.5)
    expected = -0.9 * math.log(1 / (1 + math.exp(-0.5))) - 0.1 * math.log(1 / (1 + math.exp(0.5)))
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    assert {name: value.item() for name, value in output.metrics.items()} == {
        "accuracy": 1,
        "margin": 1.0,
        "chosen_logratio": 0.5,
        "rejected_logratio": -0.5,
        "chosen_logprob": -3.0,
        "rejected_logprob": -4.0,
    }
    # Means: 0.5 / 2 targets and -0.5 / 1: d = 0.75, beta d = 0.375.
    output, _ = pair_term(0.1, beta=0.5, length_norm=True)
    expected = -0.9 * math.log(1 / (1 + math.exp(-0.375))) - 0.1 * math.log(1 / (1 + math.exp(0.375)))
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)


def test_ipo_of_sums_and_of_means_by_hand():
    # beta 0.25: the target is 1 / 0.5 = 2. Sums: d = 1, (1 - 2)^2 = 1, gradient 2 (1 - 2) = -2 by d.
    output, gradient = pair_term(0.0, loss="ipo", beta=0.25)
    assert (output.loss.item(), gradient) == (1.0, [-2.0, -2.0, 2.0])
    # Means: d = 0.75, 1.25^2 = 1.5625, gradient -2.5 by d, half of it for each of two targets.
    output, gradient = pair_term(0.0, loss="ipo", beta=0.25, length_norm=True)
    assert (output.loss.item(), gradient) == (1.5625, [-1.25, -1.25, 2.5])
