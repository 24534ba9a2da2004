"""Token weights by hand, and the path from samples to the joint loss: plan, collate, log-probabilities, loss."""

from __future__ import annotations

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

from learners.objective.joint import Denominators, joint_loss, token_weights, total_loss, weigh_items
from learners.samples.batching import collate
from learners.samples.types import PackItem, PolicyTokens, Sample
from rlsys.config.objective import ObjectiveConfig, PolicyConfig, SftConfig

AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]


def objective(policy: dict[str, Any] | None = None, **others: dict[str, Any]) -> ObjectiveConfig:
    return ObjectiveConfig(**{"kl": {"weight": 0.3}, "policy": policy or {}, **others})


def weights_of(lengths: Sequence[int], aggregation: str, max_tokens: int = 10) -> list[float]:
    return token_weights(lengths, aggregation=aggregation, max_tokens=max_tokens).tolist()


def test_weights_by_hand():
    # 6 tokens in 3 samples, of which 2 have tokens; max_tokens 10
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
    # The first token of a sample is never a target, so it is not counted.
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
        weighed, denominators = weigh_items(items, PolicyConfig(aggregation=aggregation), 12)
        assert denominators == Denominators(policy=count, value=0, pairs=1, sft=6)
        weights = [sample.policy.weight for item in weighed for sample in item.samples if sample.policy]
        assert weights == pytest.approx(per_sample, rel=1e-12)
        assert {sample.sft_weight for item in weighed for sample in item.samples} == {1 / 6}
        assert [item.pair.weight for item in weighed if item.pair] == [1.0]


def test_the_critic_counts_the_tokens_that_have_a_return():
    # Samples of a searched group have no returns, so they are not targets of the critic.
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
    for changed_items, plan in cases:
        actual, actual_gradient = update(changed_items, config, plan=plan)
        assert actual == pytest.approx(losses, rel=1e-11)
        torch.testing.assert_close(actual_gradient, gradient, rtol=1e-11, atol=1e-14)


def test_a_mean_of_local_means_would_change_the_loss():
    # The mistake that global denominators prevent: every micro-batch divided by its own count.
    items, config = mixed_items(), objective()
    losses, _ = update(items, config)
    parts = [items[:10], items[10:16], items[16:]]
    local = [item for part in parts for item in weigh_items(part, config.policy, 12)[0]]
    wrong, _ = update(local, config, weigh=False)
    assert all(abs(wrong[name] / 3 - losses[name]) > 1e-3 * abs(losses[name]) for name in WEIGHTS)


WITHOUT_TERM = {  # a sample without its targets of one term; a pair without preference term loses its rejected side
    "policy": lambda sample: replace(sample, policy=None),
    "sft": lambda sample: replace(sample, sft_mask=None),
    "preference": lambda sample: replace(sample, preference_mask=None),
}


@pytest.mark.parametrize("term", WITHOUT_TERM)
@pytest.mark.parametrize("removed", WITHOUT_TERM)
def test_a_term_does_not_depend_on_the_others(term, removed):
    if term == removed:
        return
    items, config = mixed_items(), objective()
    left = []
    for item in items:
        samples = tuple(WITHOUT_TERM[removed](sample) for sample in item.samples)
        remaining = PackItem(samples=samples[:1]) if removed == "preference" else replace(item, samples=samples)
        left += [remaining] if any(sample.targets.any() for sample in remaining.samples) else []
    names = ("policy", "kl") if term == "policy" else (term,)
    # A term of weight 0 would be 0 in both: only the one in question has a weight.
    weights = {name: WEIGHTS[name] for name in names}
    expected, gradient = update(items, config, weights=weights)
    actual, actual_gradient = update(left, config, weights=weights)
    assert actual == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(actual_gradient, gradient, rtol=1e-12, atol=1e-15)
    others, _ = update(left, config)
    assert others[removed] == 0.0
    assert "kl" not in others or removed != "policy" or others["kl"] == 0.0


def test_kl_is_a_term_of_its_own():
    # The other terms do not change without it, and the gradients of all terms add up.
    items, config = mixed_items(), objective()
    parts = [update(items, config, weights={name: WEIGHTS[name]}) for name in WEIGHTS]
    losses, gradient = update(items, config)
    for (part_losses, _), name in zip(parts, WEIGHTS, strict=True):
        assert part_losses[name] == pytest.approx(losses[name], rel=1e-12)
    torch.testing.assert_close(sum(part for _, part in parts), gradient, rtol=1e-12, atol=1e-15)


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
    # Without log-probabilities of a reference policy there is no KL term.
    items, _ = weigh_items([item], PolicyConfig(), 12)
    batch = collate(items, 0)
    logprobs, entropy, *_ = target_logprobs(TinyCausalModel(), batch)
    terms = joint_loss(logprobs, entropy, batch, objective())
    assert set(terms) == {term}
    assert total_loss(terms, {term: 2.0}, logprobs).item() == pytest.approx(2 * terms[term].loss.item(), rel=1e-12)


@pytest.mark.parametrize("items", [[], [PackItem(samples=(policy_sample([1, 2, 3], [0, 0, 0], [1, 1, 1]),))]])
def test_nothing_to_train_is_a_loss_of_zero_with_a_gradient_of_zero(items):
    batch, model = collate(weigh_items(items, PolicyConfig(), 12)[0], 0), TinyCausalModel()
    logprobs, entropy, *_ = target_logprobs(model, batch)
    terms = joint_loss(logprobs, entropy, batch, objective({"surrogate": "gspo", "aggregation": "sequence_mean"}))
    loss = total_loss(terms, WEIGHTS, logprobs)
    loss.backward()
    assert loss.item() == 0.0
    assert [parameter.grad.abs().max().item() for parameter in model.parameters()] == [0.0, 0.0]


def test_garbage_where_nothing_is_trained_changes_nothing():
    items, config = mixed_items(), objective()
    losses, gradient = update(items, config)

    def spoiled(sample: Sample) -> Sample:
        """Return the sample with more tokens at the end and NaN at untrained tokens."""

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
    for changed_items, pad_id in ((changed, 0), (items, 7)):
        actual, actual_gradient = update(changed_items, config, pad_id=pad_id, plan=planned(changed_items, 2, 60))
        assert actual == pytest.approx(losses, rel=1e-11)
        torch.testing.assert_close(actual_gradient, gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("mask_prefix_sft", [False, True])
def test_the_prefix_mask_of_the_supervised_term(mask_prefix_sft):
    # The mean over the trained tokens of the chosen side: all of them, or from the first difference on.
    pairs, sft = random_preferences(4), SftConfig(mask_prefix_sft=mask_prefix_sft)
    items = [pair_item(pair, mask_prefix_sft=sft.mask_prefix_sft) for pair in pairs]
    losses, _ = update(items, objective())
    expected = []
    for pair in pairs:
        sample = PackItem(samples=(sft_sample(pair.chosen_ids.tolist(), np.ones(len(pair.chosen_ids), dtype=bool)),))
        logprobs, *_ = target_logprobs(TinyCausalModel(), collate([sample], 0))
        start = pair.common if mask_prefix_sft else pair.prompt_length
        expected += logprobs[start - 1 :].tolist()  # target s of a sample is token s + 1
    assert losses["sft"] == pytest.approx(-np.mean(expected), rel=1e-6)


def test_the_learner_recomputes_the_samplers_log_probabilities():
    """Tokens sampled one by one at a temperature and trained in one padded batch have ratio 1."""
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
        logprobs, *_ = target_logprobs(model, batch)
        plain = torch.log_softmax(model(torch.tensor([[1, 2, 3]])), dim=-1)[0, [0, 1], [2, 3]]
    # Behavior log-probabilities are stored in fp32.
    assert (logprobs[batch.policy.positions] - batch.policy.behavior_logprobs).abs().max() < 1e-6
    assert (logprobs[batch.sft.positions] - plain).abs().max() < 1e-12  # supervised targets use temperature 1
