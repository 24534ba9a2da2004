"""Temperature and entropy of forward passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from joint_samples import ids, policy_sample, random_preferences, sft_sample
from plain_rank import (
    EVERY_TERM,
    NOTHING_SCORED,
    TEMPERATURE,
    chain,
    distribution,
    everything,
    logprob,
    plain_rank,
)

from learners.objective import logprobs
from learners.samples.batching import collate
from learners.samples.types import PackItem
from rlsys.config.schema import LearnerConfig
from rlsys.errors import InputError
from rlsys.types import TrainingBatch

pytestmark = pytest.mark.usefixtures("process_group")


def test_only_the_policys_own_tokens_use_the_sampling_temperature() -> None:
    rank = plain_rank({})
    module = rank.policy.module
    samples = [policy_sample([5, 6, 7], [0, 1, 1], [0, 1, 1]), sft_sample([5, 6, 7], [0, 1, 1])]
    batch = collate([PackItem(samples=(sample,)) for sample in samples], 0)
    target_logprobs, entropy, *_ = rank.forward.logprobs(rank.policy, batch, entropy=True)
    expected = [logprob(module, [5, 6, 7], 1, temperature) for temperature in (TEMPERATURE, 1.0)]
    torch.testing.assert_close(target_logprobs, torch.cat(expected), rtol=1e-7, atol=0)  # 0.8 is rounded to fp32
    likely = distribution(module, [5, 6, 7], TEMPERATURE)
    torch.testing.assert_close(entropy, -(likely.exp() * likely).sum(dim=-1).detach(), rtol=1e-7, atol=0)
    assert not torch.allclose(*expected)


def test_entropy_is_computed_only_for_the_policys_targets_in_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[int] = []
    whole = logprobs._entropy
    monkeypatch.setattr(logprobs, "_entropy", lambda logits: counted.append(len(logits)) or whole(logits))
    rank = plain_rank({**EVERY_TERM, "grad_norm_interval": 0}, updates=2)  # all models compute scores too
    metrics = rank.train(everything(), 0, 1)
    assert sum(counted) == 2 * metrics["objective/policy_denominator"]
    counted.clear()
    batch = TrainingBatch(pairs=tuple(random_preferences(3)), demonstrations=(chain([5, 6, 7], 1),))
    plain_rank({**NOTHING_SCORED, "sft": {"weight": 1.0}}, stage="preference").train(batch, 0, 1)
    plain_rank({}, stage="sft").train(batch, 0, 1)
    samples = [policy_sample([5, 6, 7], [0, 1, 1], [0] * 3)]
    for score in (rank.scorer.old_logprobs, rank.scorer.reference_logprobs, rank.scorer.values):
        score(samples)
    rank.score_pairs(random_preferences(2))
    rank.score([ids(5, 6, 7)])
    assert sum(counted) == 0


def test_ranks_that_share_rows_have_the_same_passes_with_the_tokens_of_all_of_them() -> None:
    items = [PackItem(samples=(sft_sample([5] * length, [0] + [1] * (length - 1)),)) for length in range(3, 11)]

    def shares(rank: int, ranks: int, size: int, budget: int) -> list[list[int]]:
        forward = plain_rank({}).forward
        learner = LearnerConfig(ranks=ranks, sequence_parallel=size, micro_batch_tokens=budget)
        forward._settings = replace(forward._settings, rank=rank, ranks=ranks, learner=learner)
        return [share.numbers for share in forward.shares(items)]

    whole = [shares(rank, 2, 1, 32) for rank in range(2)]
    assert sorted(number for rank in whole for share in rank for number in share) == list(range(8))
    assert [shares(rank, 4, 2, 16) for rank in range(4)] == [whole[0], whole[0], whole[1], whole[1]]


def test_rows_of_several_ranks_are_short_enough_to_be_dealt_evenly() -> None:
    """All prompts begin alike, so one rank could have all of them in one row."""
    chains = [[5] * 10 + [6 + group] * 20 + [14, draw, 20] for group in range(6) for draw in range(4)]
    items = [PackItem(samples=(sft_sample(each, [0] + [1] * (len(each) - 1)),)) for each in chains]
    for ranks, expected in ((1, {24}), (2, {12}), (3, {8})):
        forward = plain_rank({}).forward
        forward._packs = True
        learner = LearnerConfig(ranks=ranks, micro_batch_tokens=10_000)
        numbers, longest = set(), set()
        for rank in range(ranks):
            forward._settings = replace(forward._settings, rank=rank, ranks=ranks, learner=learner)
            shares = forward.shares(items)
            numbers |= {number for share in shares for number in share.numbers}
            longest.add(sum(len(share.numbers) for share in shares))
        assert numbers == set(range(24)) and longest == expected


def test_tokens_beyond_the_vocabulary_are_an_error_of_the_input() -> None:
    rank = plain_rank({})
    largest = rank.policy.module.config.vocab_size - 1
    rank.forward.vocabulary = largest + 1
    batch = TrainingBatch(demonstrations=(chain([5, largest], 1),))
    assert rank.score([ids(5, largest)])[0].shape == (1,)
    sft = plain_rank({}, stage="sft")
    sft.forward.vocabulary = largest + 1
    sft.train(batch, 0, 1)
    message = f"token id {largest + 1} is beyond the vocabulary of the policy, which has {largest + 1} tokens"
    with pytest.raises(InputError, match=message):
        rank.score([ids(5, largest + 1)])
    with pytest.raises(InputError, match=message):
        sft.train(TrainingBatch(demonstrations=(chain([5, largest + 1], 1),)), 0, 1)
