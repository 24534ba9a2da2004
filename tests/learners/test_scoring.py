"""Scores of samples and pairs on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
from joint_samples import ids, policy_sample, random_preferences
from plain_rank import (
    EVERY_TERM,
    TEMPERATURE,
    logprob,
    plain_rank,
    spoil,
)

from rlsys.errors import NonFiniteLossError
from rlsys.types import Preference

pytestmark = pytest.mark.usefixtures("process_group")


def test_scores_are_at_the_positions_of_their_tokens() -> None:
    rank = plain_rank({}, budget=16)
    samples = [
        policy_sample([5, 6, 7, 8, 9], [0, 1, 0, 1, 0], [0] * 5),
        policy_sample([5, 6], [0, 0], [0] * 2),
        policy_sample([9, 8, 7], [1, 1, 1], [0] * 3),
    ]
    scores = rank.scorer.old_logprobs(samples)
    own, last = (logprob(rank.policy.module, sample.token_ids, 1, TEMPERATURE) for sample in (samples[0], samples[2]))
    assert [each.shape for each in scores] == [(5,), (2,), (3,)]
    assert scores[0].tolist() == pytest.approx([0, own[0].item(), 0, own[2].item(), 0], rel=1e-6)
    assert scores[1].tolist() == [0, 0]
    assert scores[2].tolist() == pytest.approx([0, *last.tolist()], rel=1e-6)  # the first token has no prediction
    assert rank.scorer.old_logprobs([]) == []
    assert rank.scorer.old_logprobs([samples[1]])[0].tolist() == [0, 0]  # nothing to score in any sample


def test_without_a_reference_policy_nothing_is_scored() -> None:
    rank = plain_rank({})
    rank.reference = None
    assert rank.scorer.reference_pair_scores([]) == []
    assert rank.scorer.reference_logprobs([]) == []


def test_scores_of_pairs_are_sums_without_a_temperature() -> None:
    rank = plain_rank({})
    pairs: list[Preference] = random_preferences(4)
    for scores, module in (
        (rank.score_pairs(pairs), rank.policy.module),
        (rank.scorer.reference_pair_scores(pairs), rank.reference.module),
    ):
        for pair, pair_scores in zip(pairs, scores, strict=True):
            sides = (pair.chosen_ids, pair.rejected_ids)
            expected = [logprob(module, tokens, pair.common).sum().item() for tokens in sides]
            assert pair_scores == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "spoilt", "name"),
    [
        ("old_logprobs", "policy", "log-probabilities of the policy"),
        ("reference_logprobs", "reference", "log-probabilities of the reference policy"),
        ("values", "critic", "values of the critic"),
    ],
)
def test_a_score_that_is_not_finite_is_an_error_with_its_name(method: str, spoilt: str, name: str) -> None:
    rank = plain_rank(EVERY_TERM)
    models = {"policy": rank.policy.module, "reference": rank.reference.module, "critic": rank.critic.module}
    spoil(models.pop(spoilt))
    samples = [policy_sample([5, 6, 7], [0, 1, 1], [0] * 3), policy_sample([5, 8, 9], [0, 1, 1], [0] * 3)]
    with pytest.raises(NonFiniteLossError, match=f"^{name}: 2 of 4 not finite; nothing was updated or published$"):
        getattr(rank.scorer, method)(samples)
    for other in {"old_logprobs", "reference_logprobs", "values"} - {method}:
        assert len(getattr(rank.scorer, other)(samples)) == 2


def test_pairs_without_finite_scores_are_named() -> None:
    rank = plain_rank({})
    pair = replace(random_preferences(1)[0], chosen_ids=ids(1, 8, 9), rejected_ids=ids(1, 3), prompt_length=1, common=1)
    spoil(rank.policy.module)
    with pytest.raises(NonFiniteLossError, match=r"^log-probabilities of preference pairs under the policy: 2 of 3 "):
        rank.score_pairs([pair])
    assert len(rank.scorer.reference_pair_scores([pair])) == 1
    spoil(rank.reference.module)
    with pytest.raises(NonFiniteLossError, match=r"^log-probabilities of preference pairs under the reference policy"):
        rank.scorer.reference_pair_scores([pair])
