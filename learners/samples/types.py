"""Training samples: token sequences with the tokens that each term of the joint loss trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rlsys.sequences import common_prefix_length
from rlsys.types import BoolArray, Demonstration, Float32Array, Int32Array, Preference, StepPreference, TeacherTokens

Origin = tuple[int, int]
"""Numbers of a group in its batch, and of a trajectory in its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """Tokens of a sample that the policy term trains. The arrays have valid values where `mask` is True.

    Attributes:
        mask: [T] bool, True on tokens that may be trained. Token 0 has no prediction and is never trained.
        behavior_logprobs: [T] float32, nats, as the sampler reported them.
        advantages: [T] float32.
        weight: weight of each of these tokens in the loss of the update; includes aggregation and global denominator.
        old_logprobs: [T] float32, nats, of the policy at the start of the step. None means the current policy.
        reference_logprobs: [T] float32, nats, of the reference policy; None without a KL term.
        values: [T] float32, the critic's estimates at the start of the step; None without a critic.
        returns: [T] float32, the critic's targets; None without a critic.
        teacher_logprobs: [T] float32, nats, of the teacher; None without a teacher in the ratio.
    """

    mask: BoolArray
    behavior_logprobs: Float32Array
    advantages: Float32Array
    weight: float = 0.0
    old_logprobs: Float32Array | None = None
    reference_logprobs: Float32Array | None = None
    values: Float32Array | None = None
    returns: Float32Array | None = None
    teacher_logprobs: Float32Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillTokens:
    """Tokens of a sample that the term distill trains.

    Attributes:
        mask: [T] bool, True on tokens that may be trained.
        teacher: the teacher's scores, valid where `mask` is True; None for a teacher of the whole vocabulary, whom the
            learner asks in the pass.
        weight: weight of each of these tokens in the loss of the update.
        behavior_logprobs: [T] float32, nats, of the tokens as the sampler reported them; None in a row that the policy
            did not write.
    """

    mask: BoolArray
    teacher: TeacherTokens | None
    weight: float = 0.0
    behavior_logprobs: Float32Array | None = None

    @property
    def own(self) -> bool:
        """Whether the policy wrote the tokens."""
        return self.behavior_logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training sequence.

    Attributes:
        token_ids: [T] int32, T >= 1.
        policy: the tokens that the policy term trains.
        sft_mask: [T] bool, tokens whose negative log-likelihood is trained.
        sft_weight: weight of each token of `sft_mask` in the loss.
        preference_mask: [T] bool, tokens whose log-probabilities are summed into the score of this side of a pair.
        distill: the tokens that the term distill trains.
        ranking_mask: [T] bool, tokens whose mean log-probability is the score of this answer among those of its prompt.
        input_ids: [T] int32, the tokens that the model sees in the place of token_ids, which stay the targets; None for
            token_ids themselves.
        origin: the trajectory that it was built from; None for other data.
    """

    token_ids: Int32Array
    policy: PolicyTokens | None = None
    sft_mask: BoolArray | None = None
    sft_weight: float = 0.0
    preference_mask: BoolArray | None = None
    distill: DistillTokens | None = None
    ranking_mask: BoolArray | None = None
    input_ids: Int32Array | None = None
    origin: Origin | None = None

    @property
    def inputs(self) -> Int32Array:
        """[T] int32, the tokens that the model sees."""
        return self.token_ids if self.input_ids is None else self.input_ids

    @property
    def length(self) -> int:
        """Number of tokens, T."""
        return len(self.token_ids)

    @property
    def policy_mask(self) -> BoolArray | None:
        """[T] bool, tokens that the policy term trains."""
        return self.policy.mask if self.policy else None

    @property
    def distill_mask(self) -> BoolArray | None:
        """[T] bool, tokens that the term distill trains."""
        return self.distill.mask if self.distill else None

    @property
    def targets(self) -> BoolArray:
        """[T] bool, tokens that any term trains."""
        any_mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        for mask in (self.policy_mask, self.sft_mask, self.preference_mask, self.distill_mask, self.ranking_mask):
            if mask is not None:
                any_mask |= mask
        any_mask[0] = False
        return any_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Inputs of the preference term for one pair, in addition to its two samples.

    Attributes:
        reference: scores of the chosen and the rejected side under the reference policy, sums in nats.
        smoothing: label smoothing eps of this pair.
        weight: weight of the pair in the loss.
    """

    reference: tuple[float, float]
    smoothing: float
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Inputs of the ranking term for one prompt, in addition to the samples of its answers.

    Attributes:
        is_right: whether the answer of each sample is right.
        weight: weight of the prompt in the loss.
    """

    is_right: tuple[bool, ...]
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PackItem:
    """Samples that must share a micro-batch: a single one, the two sides of a pair, or the answers of a ranking."""

    samples: tuple[Sample, ...]
    pair: Pair | None = None
    ranking: Ranking | None = None

    @property
    def length(self) -> int:
        """Number of tokens of the longest sample."""
        return max(sample.length for sample in self.samples)


def count_targets(mask: BoolArray | None) -> int:
    """Return the number of trained tokens in a mask. The first token has no prediction and never counts."""
    return 0 if mask is None else int(mask[1:].sum())


def demonstration_sample(
    demonstration: Demonstration, *, sft: bool = True, distill: bool = False, whole: bool = False
) -> Sample:
    """Return the sample of a row that the policy did not write.

    Args:
        sft: whether the term sft trains it.
        distill: whether the term distill trains it.
        whole: whether the teacher of this term is asked in the pass.

    Raises:
        ValueError: the term distill needs scores of a teacher, and the row has none.
    """
    teacher, tokens = demonstration.teacher, None
    if distill and whole:
        tokens = DistillTokens(mask=demonstration.loss_mask, teacher=None)
    elif distill and teacher is not None:
        tokens = DistillTokens(mask=teacher.mask, teacher=teacher)
    elif distill:
        raise ValueError("expected a row with the scores of a teacher, found none")
    return Sample(
        token_ids=demonstration.token_ids,
        sft_mask=demonstration.loss_mask if sft else None,
        distill=tokens,
    )


def step_pair(preference: StepPreference) -> Preference | None:
    """Return the pair of the prefix with each continuation; None if one side is a prefix of the other."""
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


def pair_samples(pair: Preference, *, mask_prefix: bool, sft: bool, mask_prefix_sft: bool) -> tuple[Sample, Sample]:
    """Build the samples of the chosen and the rejected side of a pair.

    Args:
        pair: two complete chains for one prompt.
        mask_prefix: score only the tokens after the common prefix, not all tokens after the prompt.
        sft: also train the likelihood of the chosen side.
        mask_prefix_sft: train that likelihood only after the common prefix.
    """

    def mask_from(start: int, ids: Int32Array, written: BoolArray | None) -> BoolArray:
        after = np.arange(len(ids)) >= start
        return after if written is None else after & written

    scored = pair.common if mask_prefix else pair.prompt_length
    supervised = pair.common if mask_prefix_sft else pair.prompt_length
    chosen = Sample(
        token_ids=pair.chosen_ids,
        preference_mask=mask_from(scored, pair.chosen_ids, pair.chosen_mask),
        sft_mask=mask_from(supervised, pair.chosen_ids, pair.chosen_mask) if sft else None,
    )
    rejected_mask = mask_from(scored, pair.rejected_ids, pair.rejected_mask)
    return chosen, Sample(token_ids=pair.rejected_ids, preference_mask=rejected_mask)


def lacks_old_logprobs(sample: Sample) -> bool:
    """Return whether the policy term trains the sample and its old log-probabilities are unknown."""
    return sample.policy is not None and sample.policy.old_logprobs is None


def with_old_logprobs(sample: Sample, old_logprobs: Float32Array) -> Sample:
    """Return the sample with the old policy's log-probabilities, [T] nats."""
    return replace(sample, policy=replace(sample.policy, old_logprobs=old_logprobs)) if sample.policy else sample
