"""The samples of an update that can change a weight. The others need no forward and no backward pass."""

from __future__ import annotations

from collections.abc import Mapping

from learners.samples.types import PackItem, Sample, count_targets
from rlsys.config.objective import ObjectiveConfig


def changes_weights(item: PackItem, weights: Mapping[str, float], objective: ObjectiveConfig) -> bool:
    """Return whether any gradient of an item can differ from 0.

    An item without a gradient still counts in the denominators of its terms.

    Args:
        item: samples that share a micro-batch.
        weights: weight of each term in this step; a term without a weight is missing.
        objective: the joint objective.
    """
    return any(_trains(sample, weights, objective) for sample in item.samples)


def policy_changes_weights(sample: Sample, weights: Mapping[str, float], objective: ObjectiveConfig) -> bool:
    """Return whether the terms policy, kl and custom can have a gradient in a sample.

    The surrogates multiply by the advantage, so equal rewards in a group give no gradient. Entropy bonus, KL loss
    and a loss of the user have a gradient without an advantage.
    """
    tokens = sample.policy
    if tokens is None or not count_targets(tokens.mask):
        return False
    if "custom" in weights:
        return True
    if "kl" in weights and tokens.reference_logprobs is not None and not objective.kl.in_reward:
        return True
    return "policy" in weights and bool(
        objective.policy.entropy_coef or (tokens.advantages[1:] * tokens.mask[1:]).any()
    )


def _trains(sample: Sample, weights: Mapping[str, float], objective: ObjectiveConfig) -> bool:
    return bool(
        ("sft" in weights and count_targets(sample.sft_mask))
        or ("distill" in weights and count_targets(sample.distill_mask))
        or ("ranking" in weights and count_targets(sample.ranking_mask))
        or ("preference" in weights and count_targets(sample.preference_mask))
        or policy_changes_weights(sample, weights, objective)
    )
