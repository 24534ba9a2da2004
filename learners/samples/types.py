"""What an optimizer update trains on: rows of tokens, and for every term of the joint loss which of them it trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rlsys.sequences import common_prefix_length
from rlsys.types import BoolArray, Demonstration, Float32Array, Int32Array, Preference, StepPreference


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """What the policy term trains in a row; arrays of [T], defined where `mask` is True.

    mask: [T] bool, True on tokens that may be trained. Token 0 has no prediction and is never trained.
    behavior_logprobs: [T] float32, nats; what the sampler gave each token.
    advantages: [T] float32.
    weight: of every one of these tokens in the loss of its update, aggregation and global denominator included.
    old_logprobs: [T] float32, of the policy at the start of the step; None where that is the present policy.
    reference_logprobs: [T] float32, of the reference policy; None without a KL term.
    values, returns: [T] float32, the critic's estimate at the start of the step and its target; None without a critic.
    """

    mask: BoolArray
    behavior_logprobs: Float32Array
    advantages: Float32Array
    weight: float = 0.0
    old_logprobs: Float32Array | None = None
    reference_logprobs: Float32Array | None = None
    values: Float32Array | None = None
    returns: Float32Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training sequence.

    token_ids: [T] int32, T >= 1.
    policy: what the policy term trains of it.
    sft_mask: [T] bool, tokens whose negative log-likelihood is trained. sft_weight: of each of them in the loss.
    preference_mask: [T] bool, tokens whose log-probabilities make the score of this side of a pair.
    """

    token_ids: Int32Array
    policy: PolicyTokens | None = None
    sft_mask: BoolArray | None = None
    sft_weight: float = 0.0
    preference_mask: BoolArray | None = None

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def policy_mask(self) -> BoolArray | None:
        return self.policy.mask if self.policy else None

    @property
    def targets(self) -> BoolArray:
        """[T] bool, tokens that any term trains."""
        found = np.zeros(len(self.token_ids), dtype=np.bool_)
        for mask in (self.policy_mask, self.sft_mask, self.preference_mask):
            if mask is not None:
                found |= mask
        found[0] = False
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What the preference term needs of a pair beside its two rows.

    reference: score of the chosen and of the rejected side under the reference policy, sums in nats.
    smoothing: eps of this pair. weight: of the pair in the loss.
    """

    reference: tuple[float, float]
    smoothing: float
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Rows that must be in one micro-batch: one, or the chosen and the rejected side of a pair."""

    rows: tuple[Row, ...]
    pair: Pair | None = None

    @property
    def length(self) -> int:
        return max(row.length for row in self.rows)


def trained(mask: BoolArray | None) -> int:
    """Number of targets that a mask makes: what a denominator must count. The first token is never one."""
    return 0 if mask is None else int(mask[1:].sum())


def demonstration_row(demonstration: Demonstration) -> Row:
    return Row(token_ids=demonstration.token_ids, sft_mask=demonstration.loss_mask)


def step_pair(preference: StepPreference) -> Preference | None:
    """Two continuations of one prefix as two sequences; None where one is the beginning of the other."""
    prefix = preference.prefix_ids
    chosen, rejected = (np.concatenate([prefix, ids]) for ids in (preference.chosen_ids, preference.rejected_ids))
    common = common_prefix_length(chosen, rejected)
    if common == min(len(chosen), len(rejected)):
        return None
    return Preference(
        chosen_ids=chosen,
        rejected_ids=rejected,
        prompt_length=len(prefix),
        common=common,
        chosen_visits=preference.chosen_visits,
        rejected_visits=preference.rejected_visits,
    )


def pair_rows(pair: Preference, *, mask_prefix: bool, sft: bool, mask_prefix_sft: bool) -> tuple[Row, Row]:
    """The chosen and the rejected side.

    Args:
        mask_prefix: score only what follows the common prefix, its first token included.
        sft: train the chosen side's likelihood too, with mask_prefix_sft only after the common prefix.
    """

    def after(start: int, ids: Int32Array) -> BoolArray:
        return np.arange(len(ids)) >= start

    scored = pair.common if mask_prefix else pair.prompt_length
    supervised = pair.common if mask_prefix_sft else pair.prompt_length
    chosen = Row(
        token_ids=pair.chosen_ids,
        preference_mask=after(scored, pair.chosen_ids),
        sft_mask=after(supervised, pair.chosen_ids) if sft else None,
    )
    return chosen, Row(token_ids=pair.rejected_ids, preference_mask=after(scored, pair.rejected_ids))


def lacks_old(row: Row) -> bool:
    """Whether the policy term trains the row and does not know what the old policy said of it."""
    return row.policy is not None and row.policy.old_logprobs is None


def with_old(row: Row, found: Float32Array) -> Row:
    """The row with what the old policy said of its tokens, [T] nats."""
    return replace(row, policy=replace(row.policy, old_logprobs=found)) if row.policy else row
