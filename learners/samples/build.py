"""Construction of the packed items of a training step from its data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from learners.objective.preferences import adaptive_smoothing
from learners.samples.masking import UNMASKED, ThoughtMask
from learners.samples.policy import PolicyScorer, policy_samples
from learners.samples.ranking import ranking_item
from learners.samples.types import DistillTokens, PackItem, Pair, Sample, demonstration_sample, pair_samples, step_pair
from rlsys.config.objective import ObjectiveConfig
from rlsys.types import Demonstration, Preference, TrainingBatch, TrajectoryGroup


class Scorer(PolicyScorer, Protocol):
    """Scores of samples and pairs under the models on the ranks."""

    def reference_pair_scores(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """Return the scores of the chosen and the rejected side under the reference policy, sums in nats."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """Terms of the joint loss in one training step.

    Attributes:
        weights: weight of each term; a term without a weight needs no samples and no scores.
        chosen_sft: whether the term sft trains the chosen side of pairs.
        kl_weight: coefficient of the KL term in this step, in the reward or in the loss.
    """

    weights: Mapping[str, float]
    chosen_sft: bool
    kl_weight: float


def build_samples(
    batch: TrainingBatch,
    objective: ObjectiveConfig,
    terms: StepTerms,
    *,
    max_tokens: int,
    scorer: Scorer,
    thoughts: ThoughtMask = UNMASKED,
) -> list[list[list[PackItem]]]:
    """Build the samples of a training step, packed into items.

    Args:
        batch: groups, pairs and demonstrations of the step.
        objective: the joint objective.
        terms: terms of this step.
        max_tokens: length limit of a completion, `sampling.max_tokens`.
        scorer: called only for the scores that the objective needs.
        thoughts: mask of the chains of supervised rows; the sides of pairs are never masked.

    Returns:
        Three lists: for the groups, for the other pairs, and for the demonstrations. Each has one list of items per
        entry, and the items of an entry must be trained in the same update.
    """
    weights = terms.weights
    chosen_sft = terms.chosen_sft and "sft" in weights
    distill_rows = "distill" in weights and objective.distill.on_rows
    whole = objective.distill.divergence == "whole"
    numbers = itertools.count()

    def row(demonstration: Demonstration) -> PackItem:
        sample = demonstration_sample(demonstration, sft="sft" in weights, distill=distill_rows, whole=whole)
        return PackItem(samples=(thoughts.hide(sample, next(numbers)),))

    groups = _policy_items(batch.groups, objective, terms, max_tokens, scorer)
    if objective.sft.source == "trees" and "sft" in weights:
        for items, group in zip(groups, batch.groups, strict=True):
            items += map(row, group.demonstrations)
    if "ranking" in weights:
        for items, group in zip(groups, batch.groups, strict=True):
            items += filter(None, [ranking_item(group, objective.ranking.max_answers)])
    if "preference" in weights or chosen_sft:
        for items, pairs in zip(groups, _tree_pairs(batch.groups, objective, weights, scorer), strict=True):
            items += [_pair_item(pair, objective, weights, chosen_sft) for pair in pairs]
        other_pairs = [[_pair_item(pair, objective, weights, chosen_sft)] for pair in batch.pairs]
    else:
        other_pairs = []
    trains_rows = "sft" in weights or distill_rows
    demonstrations = [[row(demonstration)] for demonstration in batch.demonstrations if trains_rows]
    return [groups, other_pairs, demonstrations]


def _policy_items(
    groups: Sequence[TrajectoryGroup], objective: ObjectiveConfig, terms: StepTerms, max_tokens: int, scorer: Scorer
) -> list[list[PackItem]]:
    if not {"policy", "value", "distill"} & terms.weights.keys():
        return [[] for _ in groups]
    by_group = policy_samples(groups, objective, max_tokens=max_tokens, kl_weight=terms.kl_weight, scorer=scorer)
    if objective.distill.divergence == "whole":
        by_group = [[_with_whole_teacher(sample) for sample in samples] for samples in by_group]
    if "distill" not in terms.weights or not objective.distill.on_chains:
        by_group = [[replace(sample, distill=None) for sample in samples] for samples in by_group]
    return [[PackItem(samples=(sample,)) for sample in samples] for samples in by_group]


def _with_whole_teacher(sample: Sample) -> Sample:
    """Return a sample whose policy tokens are distilled from a teacher that is asked in the pass."""
    if sample.policy is None:
        return sample
    behavior = sample.policy.behavior_logprobs
    return replace(sample, distill=DistillTokens(mask=sample.policy.mask, teacher=None, behavior_logprobs=behavior))


def _tree_pairs(
    groups: Sequence[TrajectoryGroup], objective: ObjectiveConfig, weights: Mapping[str, float], scorer: Scorer
) -> list[list[Preference]]:
    """Return the pairs of every tree. Add reference scores if the step has a preference term."""
    if objective.preference.source != "search":
        return [[] for _ in groups]
    chains = objective.preference.pairs == "chains"
    by_group = [
        list(group.pairs if chains else filter(None, map(step_pair, group.step_preferences))) for group in groups
    ]
    if "preference" in weights:
        scores = iter(scorer.reference_pair_scores([pair for pairs in by_group for pair in pairs]))
        for pairs in by_group:
            for number, pair in enumerate(pairs):
                chosen, rejected = next(scores)
                pairs[number] = replace(pair, chosen_reference=chosen, rejected_reference=rejected)
    return by_group


def count_dropped_step_pairs(groups: Sequence[TrajectoryGroup]) -> int:
    """Return the number of sibling pairs that cannot be trained because one side is a prefix of the other."""
    return sum(step_pair(preference) is None for group in groups for preference in group.step_preferences)


def _pair_item(
    pair: Preference, objective: ObjectiveConfig, weights: Mapping[str, float], chosen_sft: bool
) -> PackItem:
    preference = objective.preference
    chosen, rejected = pair_samples(
        pair,
        mask_prefix=preference.mask_prefix_dpo,
        sft=chosen_sft,
        mask_prefix_sft=objective.sft.mask_prefix_sft,
    )
    if "preference" not in weights:
        return PackItem(samples=(replace(chosen, preference_mask=None),))
    if pair.chosen_reference is None or pair.rejected_reference is None:
        raise ValueError("expected a pair with its scores under the reference policy, found none")
    smoothing = preference.label_smoothing
    if preference.adaptive_smoothing and pair.chosen_visits is not None and pair.rejected_visits is not None:
        visits = np.array([[pair.chosen_visits], [pair.rejected_visits]], dtype=np.float64)
        smoothing = float(adaptive_smoothing(visits[0], visits[1])[0])
    return PackItem(
        samples=(chosen, rejected),
        pair=Pair(reference=(pair.chosen_reference, pair.rejected_reference), smoothing=smoothing),
    )


def critic_items(items: Sequence[PackItem]) -> list[PackItem]:
    """Return the items that the critic is trained on."""
    return [
        item for item in items if any(sample.policy and sample.policy.returns is not None for sample in item.samples)
    ]


def without_policy(items: Sequence[PackItem]) -> list[PackItem]:
    """Return the items without the tokens of the policy term."""
    return [replace(item, samples=tuple(replace(sample, policy=None) for sample in item.samples)) for item in items]


def pair_score_samples(pairs: Sequence[Preference], objective: ObjectiveConfig) -> list[Sample]:
    """Return the samples whose scores a preference term needs: chosen and rejected side of each pair in turn."""
    mask_prefix = objective.preference.mask_prefix_dpo
    return [
        sample
        for pair in pairs
        for sample in pair_samples(pair, mask_prefix=mask_prefix, sft=False, mask_prefix_sft=False)
    ]
