"""From what a training step is given to the units that its updates train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from learners.objective.preferences import adaptive_smoothing
from learners.samples import policy as policy_rows
from learners.samples.types import Pair, Row, Unit, demonstration_row, pair_rows, step_pair
from rlsys.config.objective import ObjectiveConfig
from rlsys.types import Preference, TrainingBatch, TrajectoryGroup


class Scorer(policy_rows.Scorer, Protocol):
    """What the models on the ranks say of rows and pairs."""

    def reference_pairs(self, pairs: Sequence[Preference]) -> list[tuple[float, float]]:
        """Scores of chosen and rejected side under the reference policy, sums in nats."""
        ...


def step_units(
    batch: TrainingBatch,
    objective: ObjectiveConfig,
    weights: Mapping[str, float],
    *,
    chosen_sft: bool,
    kl_weight: float,
    max_tokens: int,
    scorer: Scorer,
) -> list[list[list[Unit]]]:
    """Units in lists that must stay in one update: those of every group, of the other pairs, of demonstrations.

    Args:
        weights: of the terms that the step has; nothing is made, or scored, for others.
        chosen_sft: whether the term sft trains the chosen side of pairs.
        kl_weight: of the KL term in the step, in the reward or in the loss. max_tokens: sampling.max_tokens.
    """
    chosen_sft = chosen_sft and "sft" in weights
    groups = _policy_units(batch.groups, objective, weights, kl_weight, max_tokens, scorer)
    if objective.sft.source == "trees" and "sft" in weights:
        for units, group in zip(groups, batch.groups, strict=True):
            units += [Unit(rows=(demonstration_row(chain),)) for chain in group.demonstrations]
    if "preference" in weights or chosen_sft:
        for units, pairs in zip(groups, _own_pairs(batch.groups, objective, weights, scorer), strict=True):
            units += [_pair_unit(pair, objective, weights, chosen_sft) for pair in pairs]
        others = [[_pair_unit(pair, objective, weights, chosen_sft)] for pair in batch.pairs]
    else:
        others = []
    rows = [[Unit(rows=(demonstration_row(found),))] for found in batch.demonstrations if "sft" in weights]
    return [groups, others, rows]


def _policy_units(
    groups: Sequence[TrajectoryGroup],
    objective: ObjectiveConfig,
    weights: Mapping[str, float],
    kl_weight: float,
    max_tokens: int,
    scorer: Scorer,
) -> list[list[Unit]]:
    if not {"policy", "value"} & weights.keys():
        return [[] for _ in groups]
    found = policy_rows.policy_rows(groups, objective, max_tokens=max_tokens, kl_weight=kl_weight, scorer=scorer)
    return [[Unit(rows=(row,)) for row in rows] for rows in found]


def _own_pairs(
    groups: Sequence[TrajectoryGroup], objective: ObjectiveConfig, weights: Mapping[str, float], scorer: Scorer
) -> list[list[Preference]]:
    """The pairs of every group's tree, with what the reference policy says of them."""
    if objective.preference.source != "search":
        return [[] for _ in groups]
    chains = objective.preference.pairs == "chains"
    found = [list(group.pairs if chains else filter(None, map(step_pair, group.step_preferences))) for group in groups]
    if "preference" in weights:
        scores = iter(scorer.reference_pairs([pair for pairs in found for pair in pairs]))
        for pairs in found:
            for number, pair in enumerate(pairs):
                chosen, rejected = next(scores)
                pairs[number] = replace(pair, chosen_reference=chosen, rejected_reference=rejected)
    return found


def left_out(groups: Sequence[TrajectoryGroup]) -> int:
    """Pairs of sibling nodes that no unit is made of: one side is the beginning of the other."""
    return sum(step_pair(found) is None for group in groups for found in group.step_preferences)


def _pair_unit(pair: Preference, objective: ObjectiveConfig, weights: Mapping[str, float], chosen_sft: bool) -> Unit:
    preference = objective.preference
    chosen, rejected = pair_rows(
        pair,
        mask_prefix=preference.mask_prefix_dpo,
        sft=chosen_sft,
        mask_prefix_sft=objective.sft.mask_prefix_sft,
    )
    if "preference" not in weights:
        return Unit(rows=(replace(chosen, preference_mask=None),))
    if pair.chosen_reference is None or pair.rejected_reference is None:
        raise ValueError("expected a pair with its scores under the reference policy, found none")
    smoothing = preference.label_smoothing
    if preference.adaptive_smoothing and pair.chosen_visits is not None and pair.rejected_visits is not None:
        visits = np.array([[pair.chosen_visits], [pair.rejected_visits]], dtype=np.float64)
        smoothing = float(adaptive_smoothing(visits[0], visits[1])[0])
    return Unit(
        rows=(chosen, rejected),
        pair=Pair(reference=(pair.chosen_reference, pair.rejected_reference), smoothing=smoothing),
    )


def critic_units(units: Sequence[Unit]) -> list[Unit]:
    """The rows that the critic is trained on."""
    return [unit for unit in units if any(row.policy and row.policy.returns is not None for row in unit.rows)]


def without_policy(units: Sequence[Unit]) -> list[Unit]:
    """What the other terms are for: where only the critic learns from trajectories."""
    return [unit for unit in units if all(row.policy is None for row in unit.rows)]


def pair_score_rows(pairs: Sequence[Preference], objective: ObjectiveConfig) -> list[Row]:
    """The two sides of every pair in order, with the tokens that its score is of."""
    mask_prefix = objective.preference.mask_prefix_dpo
    return [row for pair in pairs for row in pair_rows(pair, mask_prefix=mask_prefix, sft=False, mask_prefix_sft=False)]
