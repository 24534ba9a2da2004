"""Samples of a step, and the scores that building them needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from joint_samples import group, ids, policy_sample, random_preferences, searched, sft_sample, trajectory

from learners.samples.build import StepTerms, build_samples, critic_items, pair_score_samples, without_policy
from learners.samples.types import PackItem, Sample, pair_samples, step_pair
from rlsys.config.objective import ObjectiveConfig
from rlsys.types import Demonstration, Float32Array, Preference, StepPreference, TrainingBatch

PAIR = Preference(
    chosen_ids=ids(1, 2, 3, 4, 5),
    rejected_ids=ids(1, 2, 3, 6),
    prompt_length=2,
    common=3,
    chosen_visits=3,
    rejected_visits=1,
    chosen_reference=-1.0,
    rejected_reference=-2.0,
)
STEP = StepPreference(
    prefix_ids=ids(1, 2),
    chosen_ids=ids(3, 4),
    rejected_ids=ids(3, 5, 6),
    chosen_value=1.0,
    rejected_value=0.0,
    chosen_visits=1,
    rejected_visits=3,
)
CHAIN = Demonstration(token_ids=ids(1, 2, 7, 8), loss_mask=np.array([False, False, True, True]))
SAMPLED = group(trajectory([1, 2, 10], [0, 0, 1], 1.0), trajectory([1, 2, 11], [0, 0, 1], 0.0))
TREE = replace(
    searched(([1], "ok", 1.0), ([2], "wrong", 0.0)),
    pairs=(replace(PAIR, chosen_reference=None, rejected_reference=None),),
    step_preferences=(STEP,),
    demonstrations=(CHAIN,),
)
BATCH = TrainingBatch(groups=(SAMPLED, TREE), pairs=(PAIR,), demonstrations=(CHAIN, CHAIN))


class FakeScorer:
    """Counts the samples and pairs that it scores, by method."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def old_logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        return self._zeros("old", samples)

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        return self._zeros("reference", samples)

    def values(self, samples: Sequence[Sample]) -> list[Float32Array]:
        return self._zeros("values", samples)

    def reference_pair_scores(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        self.calls["pairs"] = self.calls.get("pairs", 0) + len(pairs)
        return [(-10.0 - n, -20.0 - n) for n in range(len(pairs))]

    def _zeros(self, name: str, samples: Sequence[Sample]) -> list[Float32Array]:
        self.calls[name] = self.calls.get(name, 0) + len(samples)
        return [np.zeros(sample.length, dtype=np.float32) for sample in samples]


def items(
    weights: Sequence[str],
    *,
    batch: TrainingBatch = BATCH,
    chosen_sft: bool = False,
    kl_weight: float = 0.0,
    **settings: dict[str, Any],
) -> tuple[list[list[list[PackItem]]], dict[str, int]]:
    """Return the result of `build_samples`, and the number of samples or pairs scored by each method."""
    scorer = FakeScorer()
    built = build_samples(
        batch,
        ObjectiveConfig(**settings),
        StepTerms(weights=dict.fromkeys(weights, 1.0), chosen_sft=chosen_sft, kl_weight=kl_weight),
        max_tokens=10,
        scorer=scorer,
    )
    return built, {name: count for name, count in scorer.calls.items() if count}


FILE = {"preference": {"source": "file"}}


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        (["policy"], {}, {}),
        # A term of weight 0 is not among the weights of a step, so its models compute no scores.
        (["policy"], {"preference": {"weight": 0.0, "final_weight": 1.0}, "kl": {"final_weight": 1.0}}, {}),
        (["policy", "kl"], {"kl": {"weight": 0.1}, "kl_weight": 0.1}, {"reference": 4}),
        (["policy"], {"kl": {"weight": 0.1, "in_reward": True}, "kl_weight": 0.1}, {"reference": 4, "old": 2}),
        (["sft"], {"kl": {"weight": 0.1}}, {}),
        (["preference"], {}, {"pairs": 1}),
        (["preference", "sft"], {"chosen_sft": True}, {"pairs": 1}),
        (["preference"], FILE, {}),  # the pairs of a file have their scores
        (["sft"], {"chosen_sft": True}, {}),  # no preference term, no scores
        (["policy", "value"], {"policy": {"estimator": "gae"}, "value": {"weight": 1.0}}, {"values": 2}),
        (["value"], {"policy": {"estimator": "gae"}, "value": {"weight": 1.0}}, {"values": 2}),
        ([], {}, {}),
    ],
)
def test_only_the_scores_that_the_step_needs_are_computed(weights, options, expected):
    assert items(weights, **options)[1] == expected


def test_every_source_has_its_own_items():
    # Items of a group stay together: samples of the policy, demonstrations of its tree, its pairs.
    (groups, others, demonstrations), _ = items(["policy", "preference", "sft"], sft={"source": "trees"})
    assert [[len(item.samples) for item in group_items] for group_items in groups] == [[1, 1], [1, 1, 1, 2]]
    assert groups[1][2].samples[0].sft_mask.tolist() == [False, False, True, True]
    assert groups[1][3].pair.reference == (-10.0, -20.0)
    assert [[item.pair.reference for item in pair_items] for pair_items in others] == [[(-1.0, -2.0)]]
    assert [
        [item.samples[0].token_ids.tolist() for item in demonstration_items] for demonstration_items in demonstrations
    ] == [[[1, 2, 7, 8]]] * 2


@pytest.mark.parametrize(
    ("weights", "options", "sizes"),
    [
        (["policy"], {}, [2, 2, 0, 0]),
        (["sft"], {"sft": {"source": "trees"}}, [0, 1, 0, 2]),
        (["sft"], {"sft": {"source": "chosen"}, "chosen_sft": True}, [0, 1, 1, 2]),
        (["sft"], {"sft": {"source": "demonstrations"}}, [0, 0, 0, 2]),
        (["preference"], {}, [0, 1, 1, 0]),
        (["preference"], FILE, [0, 0, 1, 0]),
        (["preference"], {"chosen_sft": True}, [0, 1, 1, 0]),
        ([], {"chosen_sft": True}, [0, 0, 0, 0]),
    ],
)
def test_no_samples_are_built_for_terms_outside_the_step(weights, options, sizes):
    (groups, others, demonstrations), _ = items(weights, **options)
    counts = [len(group_items) for group_items in groups]
    assert [*counts, sum(map(len, others)), sum(map(len, demonstrations))] == sizes


def test_without_the_preference_term_the_chosen_side_is_a_supervised_sample():
    (groups, others, _), _ = items(["sft"], chosen_sft=True)
    for item in (groups[1][0], others[0][0]):
        (sample,) = item.samples
        assert (item.pair, sample.preference_mask) == (None, None)
        assert sample.token_ids.tolist() == [1, 2, 3, 4, 5]
        assert sample.sft_mask.tolist() == [False, False, True, True, True]
    (_, others, _), _ = items(["sft"], chosen_sft=True, sft={"mask_prefix_sft": True})
    assert others[0][0].samples[0].sft_mask.tolist() == [False, False, False, True, True]


def test_the_chosen_side_is_supervised_if_the_step_has_the_term():
    for chosen_sft, weights in ((True, ["preference", "sft"]), (True, ["preference"]), (False, ["preference", "sft"])):
        (_, others, _), _ = items(weights, chosen_sft=chosen_sft)
        chosen, rejected = others[0][0].samples
        assert (chosen.sft_mask is not None) == (chosen_sft and "sft" in weights)
        assert rejected.sft_mask is None


def test_step_preferences_become_pairs_of_their_own():
    (groups, _, _), _ = items(["preference"], preference={"pairs": "steps", "adaptive_smoothing": True})
    (item,) = groups[1]
    chosen, rejected = item.samples
    assert (chosen.token_ids.tolist(), rejected.token_ids.tolist()) == ([1, 2, 3, 4], [1, 2, 3, 5, 6])
    assert chosen.preference_mask.tolist() == [False, False, False, True]  # the nodes begin alike
    # visits 1 and 3: 1 - 1 / (1 + 3 / 1) = 3/4, bounded
    assert item.pair.smoothing == 0.499


@pytest.mark.parametrize(
    ("visits", "settings", "expected"),
    [
        ((3, 1), {"adaptive_smoothing": True}, 0.25),  # 1 - 1 / (1 + 1 / 3)
        ((3, 1), {"adaptive_smoothing": True, "label_smoothing": 0.1}, 0.25),
        ((3, 0), {"adaptive_smoothing": True, "label_smoothing": 0.1}, 0.0),
        ((None, None), {"adaptive_smoothing": True, "label_smoothing": 0.1}, 0.1),
        ((3, None), {"adaptive_smoothing": True, "label_smoothing": 0.1}, 0.1),
        ((3, 1), {"label_smoothing": 0.1}, 0.1),
        ((3, 1), {}, 0.0),
    ],
)
def test_smoothing_of_a_pair(visits, settings, expected):
    pair = replace(PAIR, chosen_visits=visits[0], rejected_visits=visits[1])
    (_, others, _), _ = items(["preference"], batch=TrainingBatch(pairs=(pair,)), preference=settings)
    assert others[0][0].pair.smoothing == pytest.approx(expected, rel=1e-12)


def test_a_pair_without_scores_is_refused():
    pair = replace(PAIR, chosen_reference=None)
    with pytest.raises(ValueError, match="scores under the reference policy"):
        items(["preference"], batch=TrainingBatch(pairs=(pair,)))


def test_items_of_the_critic_and_items_without_the_policy_term():
    with_return = policy_sample([1, 2], [0, 1], [0, 1], values=np.zeros(2), returns=np.zeros(2))
    parts = [policy_sample([1, 2], [0, 1], [0, 1]), with_return, sft_sample([1, 2], [0, 1])]
    pair = PackItem(samples=pair_samples(PAIR, mask_prefix=True, sft=True, mask_prefix_sft=False))
    mixed = [*(PackItem(samples=(sample,)) for sample in parts), pair]
    assert critic_items(mixed) == [mixed[1]]
    left = without_policy(mixed)
    assert [item.samples[0].targets.any() for item in left] == [False, False, True, True]
    assert left[2:] == [mixed[2], pair]


@pytest.mark.parametrize("mask_prefix", [True, False])
def test_replies_of_an_environment_are_in_no_mask_of_a_pair(mask_prefix):
    masks = {"chosen_mask": np.arange(5) != 3, "rejected_mask": np.arange(4) != 2}
    pair = replace(PAIR, **masks)
    plain = pair_samples(PAIR, mask_prefix=mask_prefix, sft=True, mask_prefix_sft=mask_prefix)
    chosen, rejected = pair_samples(pair, mask_prefix=mask_prefix, sft=True, mask_prefix_sft=mask_prefix)
    for name, sample, before, mask in (
        ("preference_mask", chosen, plain[0], masks["chosen_mask"]),
        ("sft_mask", chosen, plain[0], masks["chosen_mask"]),
        ("preference_mask", rejected, plain[1], masks["rejected_mask"]),
    ):
        assert getattr(before, name).any()
        assert getattr(sample, name).tolist() == (getattr(before, name) & mask).tolist()


def test_pairs_are_scored_on_the_tokens_that_are_compared():
    (other,) = random_preferences(1)
    for mask_prefix, start in ((True, 3), (False, 2)):
        objective = ObjectiveConfig(preference={"mask_prefix_dpo": mask_prefix})
        samples = pair_score_samples([PAIR, other], objective)
        assert [sample.token_ids.tolist() for sample in samples[:2]] == [[1, 2, 3, 4, 5], [1, 2, 3, 6]]
        assert [np.flatnonzero(sample.preference_mask)[0] for sample in samples[:2]] == [start, start]
        assert all(sample.preference_mask is not None and sample.sft_mask is None for sample in samples)
        trained = build_samples(
            TrainingBatch(pairs=(PAIR,)),
            objective,
            StepTerms(weights={"preference": 1.0}, chosen_sft=False, kl_weight=0.0),
            max_tokens=10,
            scorer=FakeScorer(),
        )[1][0][0].samples
        for sample, scored in zip(trained, samples, strict=False):
            assert sample.preference_mask.tolist() == scored.preference_mask.tolist()


def test_two_continuations_as_sequences():
    pair = step_pair(STEP)
    assert pair is not None
    assert (pair.prompt_length, pair.common) == (2, 3)
    assert (pair.chosen_visits, pair.rejected_visits) == (1, 3)
    # Where one is the beginning of the other it has no token of its own to be judged by.
    longer = replace(STEP, rejected_ids=ids(3, 4, 5))
    assert step_pair(longer) is None
    tree = replace(TREE, step_preferences=(longer, STEP))
    (groups, _, _), calls = items(["preference"], batch=TrainingBatch(groups=(tree,)), preference={"pairs": "steps"})
    assert (len(groups[0]), calls) == (1, {"pairs": 1})
