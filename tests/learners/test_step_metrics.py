"""Figures of a step by hand, on one rank."""

from __future__ import annotations

import pytest
import torch
from joint_samples import floats, policy_sample
from tensors64 import t64

from learners.objective.losses import LossOutput
from learners.samples.batching import collate
from learners.samples.types import PackItem
from learners.step_metrics import MAXIMA, MEANS, StepMetrics, summed_gradient_norm
from rlsys.config.stages import TERMS
from rlsys.run.metrics import METRICS

pytestmark = pytest.mark.usefixtures("process_group")


def output(loss: float, **metrics: float) -> LossOutput:
    return LossOutput(t64([loss]).sum(), {name: torch.tensor(value) for name, value in metrics.items()})


def test_every_name_is_registered_whatever_terms_a_step_has() -> None:
    assert {name for names in MEANS.values() for name in names.values()} | set(MAXIMA.values()) <= set(METRICS)
    assert set(MEANS) == set(TERMS)
    for count in range(len(TERMS) + 1):
        sums = StepMetrics("cpu", TERMS[:count])
        assert set(sums.reduce(0)) <= set(METRICS)
        sums.add_pass(collate([PackItem(samples=(policy_sample([1, 2], [0, 1], [0, 1]),))], 0))
        for term in TERMS[:count]:
            sums.add_term(term, output(1.0, is_ratio_sum=1.0, is_ratio_max=1.0), 1, 1.0)
        found = sums.reduce(1)
        assert set(found) <= set(METRICS)
        assert {f"objective/{term}_loss" for term in TERMS[:count]} <= set(found)


def test_losses_are_means_over_updates_and_figures_means_over_targets() -> None:
    # Two updates of two passes each; the policy has 1 + 3 targets in all, the demonstrations 4.
    sums = StepMetrics("cpu", ("policy", "sft"))
    sums.add_term("policy", output(0.5, entropy=2.0, gap=0.5, ratio_max=1.5, gap_max=0.5), 1, 2.0)
    sums.add_term("sft", output(4.0), 4, 0.25)
    sums.add_term("policy", output(-0.25, entropy=4.0, gap=1.5, ratio_max=1.25, gap_max=0.75), 3, 2.0)
    sums.note("objective/sft_denominator", 4.0)
    sums.note("objective/sft_denominator", 0.0)
    found = sums.reduce(2)
    assert found["objective/policy_loss"] == 0.125
    assert found["objective/sft_loss"] == 2.0
    assert found["learner/loss"] == (2 * 0.5 + 0.25 * 4 - 2 * 0.25) / 2
    assert found["objective/sft_denominator"] == 2.0
    assert found["learner/entropy"] == 6 / 4
    assert found["learner/logprob_gap_mean"] == 2 / 4
    assert (found["learner/ratio_max"], found["learner/logprob_gap_max"]) == (1.5, 0.75)
    assert (found["objective/policy_share"], found["objective/sft_share"]) == (0.5, 0.5)
    assert found["learner/updates"] == 2


def test_means_of_a_term_without_data_are_left_out() -> None:
    sums = StepMetrics("cpu", ("policy", "preference"))
    sums.add_term("policy", output(1.0, entropy=2.0), 2, 1.0)
    found = sums.reduce(1)
    assert found["learner/entropy"] == 1.0
    assert (found["objective/preference_loss"], found["objective/preference_share"]) == (0.0, 0.0)
    assert not [name for name in found if name.startswith("preference/")]
    sums.add_term("preference", output(1.0, accuracy=1.0), 2, 1.0)
    assert sums.reduce(1)["preference/accuracy"] == 0.5


def test_figures_of_importance_are_left_out_where_no_token_had_such_a_weight() -> None:
    sums = StepMetrics("cpu", ("policy",))
    sums.add_term("policy", output(1.0, ratio_max=1.0), 2, 1.0)
    assert not [name for name in sums.reduce(1) if "importance" in name]
    sums.add_term("policy", output(1.0, is_ratio_sum=3.0, is_ratio_max=2.0, is_truncated=1.0), 2, 1.0)
    found = sums.reduce(1)
    assert found["learner/importance_mean"] == 3 / 4
    assert (found["learner/importance_max"], found["learner/importance_truncated"]) == (2.0, 1 / 4)


def test_padding_and_tokens() -> None:
    # Rows of 2 and 4 tokens in a batch of 2 * 4: 6 of 8 are real.
    rows = [policy_sample([1, 2], [0, 1], [0, 1]), policy_sample([1, 2, 3, 4], [0, 1, 1, 1], [0, 1, 1, 1])]
    sums = StepMetrics("cpu", ("policy",))
    sums.add_pass(collate([PackItem(samples=(row,)) for row in rows], 0))
    found = sums.reduce(1)
    assert (found["learner/tokens"], found["learner/padding_share"]) == (6.0, 0.25)


def test_the_norm_of_a_gradient_in_parts() -> None:
    assert summed_gradient_norm([t64([3.0, 0.0]), t64([[4.0]])]) == 5.0


def test_explained_variance_by_hand() -> None:
    # Returns 1, 0: variance 1/4. Less the values 1/2, 1: 1/2, -1, mean -1/4, variance 9/16: 1 - 9/4. What stands at
    # tokens that are not trained counts nowhere.
    row = policy_sample([1, 2, 3, 4], [0, 1, 0, 1], [0] * 4, values=floats(9, 0.5, 9, 1), returns=floats(9, 1, 9, 0))
    sums = StepMetrics("cpu", ("value",))
    sums.note_explained_variance([row])
    found = sums.reduce(1)
    assert found["value/explained_variance"] == -1.25
    assert found["value/mean"] == 0.75
    # Of returns that are all equal there is nothing to explain.
    level = policy_sample([1, 2], [0, 1], [0, 0], values=floats(0, 2), returns=floats(0, 1))
    sums = StepMetrics("cpu", ("value",))
    sums.note_explained_variance([level])
    found = sums.reduce(1)
    assert "value/explained_variance" not in found
    assert found["value/mean"] == 2.0
