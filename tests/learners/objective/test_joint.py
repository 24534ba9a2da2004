"""Token weights by hand, and the whole chain: samples -> plan -> collate -> log-probabilities -> joint loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from joint_samples import (
    TEMPERATURE,
    VOCABULARY,
    WEIGHTS,
    TinyCausalModel,
    floats,
    mixed_items,
    pair_item,
    planned,
    policy_sample,
    random_preferences,
    sft_sample,
    target_logprobs,
    update,
)
from tensors64 import t64

from learners.objective.joint import Denominators, joint_loss, token_weights, total_loss, weigh_items
from learners.objective.losses import LossOutput
from learners.samples.batching import collate
from learners.samples.types import PackItem, PolicyTokens, Sample
from rlsys.config.objective import ObjectiveConfig, PolicyConfig, SftConfig

AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]


def objective(policy: dict[str, Any] | None = None, **others: dict[str, Any]) -> ObjectiveConfig:
    return ObjectiveConfig(**{"kl": {"weight": 0.3}, "policy": policy or {}, **others})


def weights_of(lengths: Sequence[int], aggregation: str, max_tokens: int = 10) -> list[float]:
    return token_weights(lengths, aggregation=aggregation, max_tokens=max_tokens).tolist()


def test_weights_by_hand():
    # 6 tokens in 3 samples of which 2 have any; max_tokens 10
    lengths = [2, 4, 0]
    assert weights_of(lengths, "token_mean") == [1 / 6] * 3
    assert weights_of(lengths, "sequence_mean")[:2] == [1 / (2 * 2), 1 / (2 * 4)]
    assert weights_of(lengths, "constant") == [1 / 30] * 3


def test_weights_are_the_published_aggregations():
    lengths, generator = [3, 1, 7], np.random.default_rng(0)
    losses = [generator.normal(size=length) for length in lengths]
    total = {
        name: sum(weight * loss.sum() for weight, loss in zip(weights_of(lengths, name), losses, strict=True))
        for name in AGGREGATIONS
    }
    assert total["token_mean"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-12)
    assert total["sequence_mean"] == pytest.approx(np.mean([loss.mean() for loss in losses]), rel=1e-12)
    assert total["constant"] == pytest.approx(np.mean([loss.sum() / 10 for loss in losses]), rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_rows_and_no_tokens(aggregation):
    assert weights_of([], aggregation) == []
    assert np.isfinite(weights_of([0, 0], aggregation)).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"policy\.aggregation"):
        weights_of([1], "mean")
    for lengths, max_tokens in (([-1], 10), ([1], 0)):
        with pytest.raises(ValueError, match="expected max_tokens"):
            weights_of(lengths, "constant", max_tokens)


# --- counts ---


def test_every_term_has_its_own_count_by_hand():
    # Policy samples of 2, 3 and 0 targets; sft samples of 1 and 2; one pair whose chosen side has 3 imitated tokens.
    # The first token of a sample is never a target, so neither is it counted.
    samples = [
        policy_sample([1, 2, 3], [0, 1, 1], [0, 1, 1]),
        policy_sample([1, 2, 3, 4], [1, 1, 1, 1], [1] * 4),
        policy_sample([1, 2], [0, 0], [0, 0]),
        sft_sample([1, 2, 3], [1, 0, 1]),
        sft_sample([1, 2, 3], [0, 1, 1]),
    ]
    (pair,) = random_preferences(1)
    length = len(pair.chosen_ids)
    imitated = replace(pair_item(pair).samples[0], sft_mask=np.arange(length) >= length - 3)
    items = [PackItem(samples=(sample,)) for sample in samples] + [
        replace(pair_item(pair), samples=(imitated, pair_item(pair).samples[1]))
    ]
    for aggregation, count, per_sample in (
        ("token_mean", 5, [1 / 5] * 3),
        ("sequence_mean", 2, [1 / (2 * 2), 1 / (2 * 3), 1 / 2]),
        ("constant", 3 * 12, [1 / 36] * 3),
    ):
        found, counts = weigh_items(items, PolicyConfig(aggregation=aggregation), 12)
        assert counts == Denominators(policy=count, value=0, pairs=1, sft=6)
        weights = [sample.policy.weight for item in found for sample in item.samples if sample.policy]
        assert weights == pytest.approx(per_sample, rel=1e-12)
        assert {sample.sft_weight for item in found for sample in item.samples} == {1 / 6}
        assert [item.pair.weight for item in found if item.pair] == [1.0]


def test_the_critic_counts_the_tokens_that_have_a_return():
    # Those of a searched group have none: they are no targets of the critic.
    with_return = policy_sample([1, 2, 3], [0, 1, 1], [0, 1, 1], values=floats(0, 1, 1), returns=floats(0, 1, 1))
    items = [PackItem(samples=(with_return,)), PackItem(samples=(policy_sample([1, 2, 3, 4], [0, 1, 1, 1], [1] * 4),))]
    assert weigh_items(items, PolicyConfig(), 12)[1] == Denominators(policy=5, value=2, pairs=0, sft=0)


def test_an_update_of_nothing_has_counts_of_nothing():
    for aggregation in AGGREGATIONS:
        policy = PolicyConfig(aggregation=aggregation)
        assert weigh_items([], policy, 12) == ([], Denominators(policy=0, value=0, pairs=0, sft=0))


# --- the joint loss ---


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": {"aggregation": "token_mean"}},
        {"policy": {"aggregation": "sequence_mean", "surrogate": "gspo"}},
        {"policy": {"aggregation": "constant", "surrogate": "cispo", "entropy_coef": 0.05}},
        {"policy": {"decoupled": False, "dual_clip": 3.0}, "preference": {"length_norm": True}},
        {"kl": {"weight": 0.3, "estimator": "k2"}, "preference": {"loss": "ipo"}},
    ],
    ids=["clip", "gspo", "cispo", "coupled", "ipo"],
)
def test_ranks_micro_batches_and_order_change_neither_losses_nor_gradient(settings):
    items, config = mixed_items(), objective(**settings)
    if config.preference.loss == "ipo":
        items = [replace(u, pair=replace(u.pair, smoothing=0.0)) if u.pair else u for u in items]
    losses, gradient = update(items, config)
    assert all(abs(loss) > 1e-3 for loss in losses.values())
    assert gradient.abs().max() > 1e-3
    assert losses["total"] == pytest.approx(sum(WEIGHTS[name] * losses[name] for name in WEIGHTS), rel=1e-12)
    plans = [planned(items, ranks, budget) for ranks, budget in ((1, 9999), (1, 20), (2, 40), (3, 16), (40, 9))]
    orders = [np.random.default_rng(seed).permutation(len(items)) for seed in range(2)]
    cases = [(items, plan) for plan in plans] + [([items[n] for n in order], None) for order in orders]
    for found_items, plan in cases:
        found, found_gradient = update(found_items, config, plan=plan)
        assert found == pytest.approx(losses, rel=1e-11)
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-11, atol=1e-14)


def test_a_mean_of_local_means_would_change_the_loss():
    # The mistake that counts of the whole update prevent: every micro-batch divided by its own.
    items, config = mixed_items(), objective()
    losses, _ = update(items, config)
    parts = [items[:10], items[10:16], items[16:]]
    local = [item for part in parts for item in weigh_items(part, config.policy, 12)[0]]
    wrong, _ = update(local, config, weigh=False)
    assert all(abs(wrong[name] / 3 - losses[name]) > 1e-3 * abs(losses[name]) for name in WEIGHTS)


OF_TERM = {  # what each term is for, of a sample; a pair that loses its score loses its rejected side
    "policy": lambda sample: replace(sample, policy=None),
    "sft": lambda sample: replace(sample, sft_mask=None),
    "preference": lambda sample: replace(sample, preference_mask=None),
}


@pytest.mark.parametrize("term", OF_TERM)
@pytest.mark.parametrize("removed", OF_TERM)
def test_a_term_does_not_depend_on_the_others(term, removed):
    if term == removed:
        return
    items, config = mixed_items(), objective()
    left = []
    for item in items:
        samples = tuple(OF_TERM[removed](sample) for sample in item.samples)
        kept = PackItem(samples=samples[:1]) if removed == "preference" else replace(item, samples=samples)
        left += [kept] if any(sample.targets.any() for sample in kept.samples) else []
    names = ("policy", "kl") if term == "policy" else (term,)
    # A term of weight 0 would be 0 in both: only the one in question has a weight.
    weights = {name: WEIGHTS[name] for name in names}
    expected, gradient = update(items, config, weights=weights)
    found, found_gradient = update(left, config, weights=weights)
    assert found == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-12, atol=1e-15)
    others, _ = update(left, config)
    assert others[removed] == 0.0
    assert "kl" not in others or removed != "policy" or others["kl"] == 0.0


def test_kl_is_a_term_of_its_own():
    # Without it the policy term is the same, and the sum of both gradients is the gradient of both.
    items, config = mixed_items(), objective()
    parts = [update(items, config, weights={name: WEIGHTS[name]}) for name in WEIGHTS]
    losses, gradient = update(items, config)
    for (found, _), name in zip(parts, WEIGHTS, strict=True):
        assert found[name] == pytest.approx(losses[name], rel=1e-12)
    torch.testing.assert_close(sum(found for _, found in parts), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("term", WEIGHTS)
def test_weights_scale_exactly(term):
    items, config = mixed_items(), objective()
    once, gradient = update(items, config, weights={term: 1.0})
    twice, double = update(items, config, weights={term: 4.0})
    assert (twice["total"], twice[term]) == (4 * once["total"], once[term])
    assert torch.equal(double, 4 * gradient)


@pytest.mark.parametrize(
    ("term", "item"),
    [
        ("policy", PackItem(samples=(policy_sample([1, 2, 3], [0, 1, 1], [0, 1, -1]),))),
        ("sft", PackItem(samples=(sft_sample([1, 2, 3], [0, 1, 1]),))),
        ("preference", pair_item(random_preferences(1)[0], sft=False)),
    ],
)
def test_a_micro_batch_of_one_kind_alone_has_that_term_alone(term, item):
    # No KL without log-probabilities of a reference policy.
    items, _ = weigh_items([item], PolicyConfig(), 12)
    batch = collate(items, 0)
    logprobs, entropy = target_logprobs(TinyCausalModel(), batch)
    terms = joint_loss(logprobs, entropy, batch, objective())
    assert set(terms) == {term}
    assert total_loss(terms, {term: 2.0}, logprobs).item() == pytest.approx(2 * terms[term].loss.item(), rel=1e-12)


@pytest.mark.parametrize("items", [[], [PackItem(samples=(policy_sample([1, 2, 3], [0, 0, 0], [1, 1, 1]),))]])
def test_nothing_to_train_is_a_loss_of_zero_with_a_gradient_of_zero(items):
    batch, model = collate(weigh_items(items, PolicyConfig(), 12)[0], 0), TinyCausalModel()
    logprobs, entropy = target_logprobs(model, batch)
    terms = joint_loss(logprobs, entropy, batch, objective({"surrogate": "gspo", "aggregation": "sequence_mean"}))
    loss = total_loss(terms, WEIGHTS, logprobs)
    loss.backward()
    assert loss.item() == 0.0
    assert [parameter.grad.abs().max().item() for parameter in model.parameters()] == [0.0, 0.0]


def test_garbage_where_nothing_is_trained_changes_nothing():
    items, config = mixed_items(), objective()
    losses, gradient = update(items, config)

    def spoiled(sample: Sample) -> Sample:
        """More tokens at the end, and NaN wherever nothing is trained."""

        def longer(mask: Any) -> Any:
            return None if mask is None else np.append(mask, [False] * 3)

        def holes(values: Any, mask: Any) -> Any:
            return None if values is None else np.append(np.where(mask, values, np.nan), [np.nan] * 3)

        policy = sample.policy and PolicyTokens(
            mask=longer(sample.policy.mask),
            **{
                name: holes(getattr(sample.policy, name), sample.policy.mask)
                for name in ("behavior_logprobs", "advantages", "old_logprobs", "reference_logprobs")
            },
        )
        return Sample(
            token_ids=np.append(sample.token_ids, [9, 9, 9]).astype(np.int32),
            policy=policy,
            sft_mask=longer(sample.sft_mask),
            preference_mask=longer(sample.preference_mask),
        )

    changed = [replace(item, samples=tuple(spoiled(sample) for sample in item.samples)) for item in items]
    for found_items, pad_id in ((changed, 0), (items, 7)):
        found, found_gradient = update(found_items, config, pad_id=pad_id, plan=planned(found_items, 2, 60))
        assert found == pytest.approx(losses, rel=1e-11)
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-11, atol=1e-14)


# --- the policy term by hand ---


def policy_term(own: float, old: float | None, behavior: float, advantage: float, **settings: Any) -> tuple[Any, float]:
    """(loss and metrics, gradient) of one token of weight 1."""
    figures = {} if old is None else {"old_logprobs": floats(0, old)}
    sample = policy_sample([1, 2], [0, 1], [0, advantage], behavior_logprobs=floats(0, behavior), **figures)
    items, _ = weigh_items([PackItem(samples=(sample,))], PolicyConfig(), 12)
    logprobs = t64([own], grad=True)
    found = joint_loss(logprobs, t64([0.5]), collate(items, 0), ObjectiveConfig(policy=settings))["policy"]
    found.loss.backward()
    return found, float(logprobs.grad)


def test_decoupled_and_coupled_ratios_by_hand():
    # own -1, old -1.125, behavior -2: decoupled r = e^0.125 = 1.1331 inside the bounds, weight e^0.875 = 2.3989 > 2.
    # loss = -2 * e^0.125 * 0.5, and its gradient is the same, for d r = r.
    found, gradient = policy_term(-1.0, -1.125, -2.0, 0.5)
    assert found.loss.item() == pytest.approx(-math.exp(0.125), rel=1e-7)
    assert gradient == pytest.approx(-math.exp(0.125), rel=1e-7)
    assert found.metrics["is_ratio_sum"].item() == pytest.approx(math.exp(0.875), rel=1e-7)
    assert found.metrics["is_truncated"].item() == 1
    assert found.metrics["gap"].item() == found.metrics["gap_max"].item() == 0.875
    # A larger cap takes the whole weight, none leaves it out.
    found, _ = policy_term(-1.0, -1.125, -2.0, 0.5, importance_cap=3.0)
    assert found.loss.item() == pytest.approx(-0.5 * math.exp(1.0), rel=1e-7)
    found, _ = policy_term(-1.0, -1.125, -2.0, 0.5, importance_cap=None)
    assert found.loss.item() == pytest.approx(-0.5 * math.exp(0.125), rel=1e-7)
    assert "is_ratio_sum" not in found.metrics
    # Coupled: r = e^1 = 2.718 is clipped to 1.28, without a gradient; A < 0 is not clipped from above.
    found, gradient = policy_term(-1.0, -1.125, -2.0, 0.5, decoupled=False)
    assert (found.loss.item(), gradient) == (pytest.approx(-0.64, rel=1e-12), 0.0)
    assert found.metrics["clipped_high"].item() == 1
    assert "is_ratio_sum" not in found.metrics
    assert found.metrics["gap"].item() == 0.875  # between learner and sampler, whichever the ratio is against
    found, gradient = policy_term(-1.0, -1.125, -2.0, -0.5, decoupled=False)
    assert gradient == pytest.approx(0.5 * math.e, rel=1e-7)


@pytest.mark.parametrize("surrogate", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("advantage", [0.5, -0.5])
@pytest.mark.parametrize("old", [-1.0, -1.125, -2.0, -0.5])
def test_decoupled_is_coupled_where_the_old_policy_sampled(old, advantage, surrogate):
    # The importance weight is e^0 = 1, and the ratio has the same denominator: 1, e^0.125, e^1 and e^-0.5, two of them
    # outside the bounds.
    settings = {"surrogate": surrogate, "entropy_coef": 0.25}
    (found, gradient), (coupled, expected) = (
        policy_term(-1.0, old, old, advantage, decoupled=decoupled, **settings) for decoupled in (True, False)
    )
    assert (found.loss.item(), gradient) == (coupled.loss.item(), expected)
    assert {name: found.metrics[name].item() for name in coupled.metrics} == {
        name: value.item() for name, value in coupled.metrics.items()
    }


def test_the_surrogate_is_the_configured_one_by_hand():
    # r = e^1 = 2.718 above 1.28. PPO's clip has no gradient there (above); CISPO's is -1.28 A, of -1.28 A * own.
    found, gradient = policy_term(-1.0, None, -2.0, 0.5, decoupled=False, surrogate="cispo")
    assert (found.loss.item(), gradient) == (pytest.approx(0.64, rel=1e-12), pytest.approx(-0.64, rel=1e-12))
    # A < 0: the loss -r A = e / 2 is bounded by -2 A = 1, without a gradient.
    found, gradient = policy_term(-1.0, None, -2.0, -0.5, decoupled=False, dual_clip=2.0)
    assert (found.loss.item(), gradient) == (pytest.approx(1.0, rel=1e-12), 0.0)
    assert found.metrics["dual_clipped"].item() == 1


def test_without_old_log_probabilities_the_present_policy_is_the_old_one():
    # r = 1 with a gradient; weight e^(2 - 1.5) = e^0.5.
    found, gradient = policy_term(-1.5, None, -2.0, 3.0)
    assert found.loss.item() == pytest.approx(-3 * math.exp(0.5), rel=1e-7)
    assert gradient == pytest.approx(-3 * math.exp(0.5), rel=1e-7)


def test_the_importance_weight_is_of_the_policy_term_alone():
    # Behavior far from old: weight e^2 capped at 2. KL and entropy bonus do not know it.
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
    found = joint_loss(logprobs, t64([0.0] * 3), collate(items, 0), ObjectiveConfig(policy=policy))["policy"]
    # -(1/2) (e^0.1 * 1) + (1/2) e^-0.2
    assert found.loss.item() == pytest.approx((-math.exp(0.1) + math.exp(-0.2)) / 2, rel=1e-7)
    found.loss.backward()
    # every token of sample 0: -s A / (n |o|) = -e^0.1 / 4
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.1) / 4] * 2 + [math.exp(-0.2) / 2], rel=1e-7)


# --- pairs ---


def both_ways(smoothing: float = 0.1, **preference: Any) -> list[tuple[dict[str, float], torch.Tensor]]:
    """The preference term with and without the mask of the common prefix.

    The reference policy's scores are of the tokens that are compared: of the prefix each gets the same -1.5.
    """
    config, found = objective(preference=preference), []
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
        found.append(update(items, config, weights={"preference": 1.0}, plan=planned(items, 2, 50)))
    return found


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
    assert batch.input_ids[:, 1:][batch.loss_mask][0].item() == 3  # the first token of the chosen tail


def pair_term(smoothing: float, **preference: Any) -> tuple[LossOutput, list[float]]:
    """(loss and metrics, gradient by the three targets) of one pair of weight 1.

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
    found = joint_loss(logprobs, t64([]), collate(items, 0), config)["preference"]
    found.loss.backward()
    return found, logprobs.grad.tolist()


def test_pair_losses_by_hand():
    # beta 0.5: z = 0.5.
    found, _ = pair_term(0.1, beta=0.5)
    expected = -0.9 * math.log(1 / (1 + math.exp(-0.5))) - 0.1 * math.log(1 / (1 + math.exp(0.5)))
    assert found.loss.item() == pytest.approx(expected, rel=1e-12)
    assert {name: value.item() for name, value in found.metrics.items()} == {
        "accuracy": 1,
        "margin": 1.0,
        "chosen_logratio": 0.5,
        "rejected_logratio": -0.5,
        "chosen_logprob": -3.0,
        "rejected_logprob": -4.0,
    }
    # Means: 0.5 / 2 targets and -0.5 / 1: d = 0.75, beta d = 0.375.
    found, _ = pair_term(0.1, beta=0.5, length_norm=True)
    expected = -0.9 * math.log(1 / (1 + math.exp(-0.375))) - 0.1 * math.log(1 / (1 + math.exp(0.375)))
    assert found.loss.item() == pytest.approx(expected, rel=1e-12)


def test_ipo_of_sums_and_of_means_by_hand():
    # beta 0.25: the target is 1 / 0.5 = 2. Sums: d = 1, (1 - 2)^2 = 1, gradient 2 (1 - 2) = -2 by d.
    found, gradient = pair_term(0.0, loss="ipo", beta=0.25)
    assert (found.loss.item(), gradient) == (1.0, [-2.0, -2.0, 2.0])
    # Means: d = 0.75, 1.25^2 = 1.5625, gradient -2.5 by d, half of it for each of two targets.
    found, gradient = pair_term(0.0, loss="ipo", beta=0.25, length_norm=True)
    assert (found.loss.item(), gradient) == (1.5625, [-1.25, -1.25, 2.5])


@pytest.mark.parametrize("mask_prefix_sft", [False, True])
def test_the_prefix_mask_of_the_supervised_term(mask_prefix_sft):
    # The mean over what is trained of the chosen side, whole or from its first difference on.
    pairs, sft = random_preferences(4), SftConfig(mask_prefix_sft=mask_prefix_sft)
    items = [pair_item(pair, mask_prefix_sft=sft.mask_prefix_sft) for pair in pairs]
    losses, _ = update(items, objective())
    expected = []
    for pair in pairs:
        sample = PackItem(samples=(sft_sample(pair.chosen_ids.tolist(), np.ones(len(pair.chosen_ids), dtype=bool)),))
        logprobs, _ = target_logprobs(TinyCausalModel(), collate([sample], 0))
        start = pair.common if mask_prefix_sft else pair.prompt_length
        expected += logprobs[start - 1 :].tolist()  # target s of a sample is token s + 1
    assert losses["sft"] == pytest.approx(-np.mean(expected), rel=1e-6)


def test_the_learner_recomputes_what_a_sampler_at_this_temperature_reported():
    """Sampled token by token at a temperature, then trained in one padded batch beside others: every ratio is 1."""
    model, generator = TinyCausalModel(), torch.Generator().manual_seed(0)
    samples = []
    for prompt, completion in ((3, 5), (1, 9), (4, 2)):
        tokens = torch.randint(VOCABULARY, (prompt,), generator=generator).tolist()
        logprobs = [0.0] * prompt
        for _ in range(completion):
            with torch.no_grad():
                p = torch.softmax(model(torch.tensor([tokens]))[0, -1] / TEMPERATURE, dim=-1)
            tokens.append(int(torch.multinomial(p, 1, generator=generator)))
            logprobs.append(float(p[tokens[-1]].log()))
        mask = np.arange(len(tokens)) >= prompt
        samples.append(policy_sample(tokens, mask, np.ones(len(tokens)), behavior_logprobs=floats(*logprobs)))
    demonstration = sft_sample([1, 2, 3], [0, 1, 1])
    items = [PackItem(samples=(sample,)) for sample in (samples[0], demonstration, *samples[1:])]
    batch = collate(items, pad_id=0)
    assert batch.policy is not None and batch.sft is not None
    with torch.no_grad():
        found, _ = target_logprobs(model, batch)
        plain = torch.log_softmax(model(torch.tensor([[1, 2, 3]])), dim=-1)[0, [0, 1], [2, 3]]
    # Behavior log-probabilities are stored in fp32.
    assert (found[batch.policy.at] - batch.policy.behavior_logprobs).abs().max() < 1e-6
    assert (found[batch.sft.at] - plain).abs().max() < 1e-12  # what is imitated knows no temperature
