"""Metrics of a step by hand, on one rank."""

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


def output(loss: float, **values: float) -> LossOutput:
    return LossOutput(t64([loss]).sum(), {name: torch.tensor(value) for name, value in values.items()})


def test_every_name_is_registered_for_any_terms_of_a_step() -> None:
    assert {name for names in MEANS.values() for name in names.values()} | set(MAXIMA.values()) <= set(METRICS)
    assert set(MEANS) == set(TERMS)
    for count in range(len(TERMS) + 1):
        step = StepMetrics("cpu", TERMS[:count])
        assert set(step.reduce(0)) <= set(METRICS)
        step.add_pass(collate([PackItem(samples=(policy_sample([1, 2], [0, 1], [0, 1]),))], 0))
        for term in TERMS[:count]:
            step.add_term(term, output(1.0, is_ratio_sum=1.0, is_ratio_max=1.0), 1, 1.0)
        metrics = step.reduce(1)
        assert set(metrics) <= set(METRICS)
        assert {f"objective/{term}_loss" for term in TERMS[:count]} <= set(metrics)


def test_losses_are_means_over_updates_and_other_metrics_means_over_targets() -> None:
    # Two updates of two passes each; the policy has 1 + 3 targets in all, the demonstrations 4.
    step = StepMetrics("cpu", ("policy", "sft"))
    step.add_term("policy", output(0.5, entropy=2.0, gap=0.5, ratio_max=1.5, gap_max=0.5), 1, 2.0)
    step.add_term("sft", output(4.0), 4, 0.25)
    step.add_term("policy", output(-0.25, entropy=4.0, gap=1.5, ratio_max=1.25, gap_max=0.75), 3, 2.0)
    step.note("objective/sft_denominator", 4.0)
    step.note("objective/sft_denominator", 0.0)
    metrics = step.reduce(2)
    assert metrics["objective/policy_loss"] == 0.125
    assert metrics["objective/sft_loss"] == 2.0
    assert metrics["learner/loss"] == (2 * 0.5 + 0.25 * 4 - 2 * 0.25) / 2
    assert metrics["objective/sft_denominator"] == 2.0
    assert metrics["learner/entropy"] == 6 / 4
    assert metrics["learner/logprob_gap_mean"] == 2 / 4
    assert (metrics["learner/ratio_max"], metrics["learner/logprob_gap_max"]) == (1.5, 0.75)
    assert (metrics["objective/policy_share"], metrics["objective/sft_share"]) == (0.5, 0.5)
    assert metrics["learner/updates"] == 2


def test_means_of_a_term_without_data_are_left_out() -> None:
    step = StepMetrics("cpu", ("policy", "preference"))
    step.add_term("policy", output(1.0, entropy=2.0), 2, 1.0)
    metrics = step.reduce(1)
    assert metrics["learner/entropy"] == 1.0
    assert (metrics["objective/preference_loss"], metrics["objective/preference_share"]) == (0.0, 0.0)
    assert not [name for name in metrics if name.startswith("preference/")]
    step.add_term("preference", output(1.0, accuracy=1.0), 2, 1.0)
    assert step.reduce(1)["preference/accuracy"] == 0.5


def test_importance_metrics_are_left_out_without_importance_weights() -> None:
    step = StepMetrics("cpu", ("policy",))
    step.add_term("policy", output(1.0, ratio_max=1.0), 2, 1.0)
    assert not [name for name in step.reduce(1) if "importance" in name]
    step.add_term("policy", output(1.0, is_ratio_sum=3.0, is_ratio_max=2.0, is_truncated=1.0), 2, 1.0)
    metrics = step.reduce(1)
    assert metrics["learner/importance_mean"] == 3 / 4
    assert (metrics["learner/importance_max"], metrics["learner/importance_truncated"]) == (2.0, 1 / 4)


def test_padding_and_tokens() -> None:
    # Rows of 2 and 4 tokens in a batch of 2 * 4: 6 of 8 are real.
    rows = [policy_sample([1, 2], [0, 1], [0, 1]), policy_sample([1, 2, 3, 4], [0, 1, 1, 1], [0, 1, 1, 1])]
    step = StepMetrics("cpu", ("policy",))
    step.add_pass(collate([PackItem(samples=(row,)) for row in rows], 0))
    metrics = step.reduce(1)
    assert (metrics["learner/tokens"], metrics["learner/padding_share"]) == (6.0, 0.25)


def test_the_norm_of_a_gradient_in_parts() -> None:
    assert summed_gradient_norm([t64([3.0, 0.0]), t64([[4.0]])]) == 5.0


def test_explained_variance_by_hand() -> None:
    # Returns 1, 0: variance 1/4. Minus the values 1/2, 1: 1/2, -1, mean -1/4, variance 9/16: 1 - 9/4. Untrained tokens
    # do not count.
    row = policy_sample([1, 2, 3, 4], [0, 1, 0, 1], [0] * 4, values=floats(9, 0.5, 9, 1), returns=floats(9, 1, 9, 0))
    step = StepMetrics("cpu", ("value",))
    step.note_explained_variance([row])
    metrics = step.reduce(1)
    assert metrics["value/explained_variance"] == -1.25
    assert metrics["value/mean"] == 0.75
    # Equal returns have no variance to explain.
    level = policy_sample([1, 2], [0, 1], [0, 0], values=floats(0, 2), returns=floats(0, 1))
    step = StepMetrics("cpu", ("value",))
    step.note_explained_variance([level])
    metrics = step.reduce(1)
    assert "value/explained_variance" not in metrics
    assert metrics["value/mean"] == 2.0
