"""The section `objective`: its own rules, and how the weight of a term changes."""

from __future__ import annotations

from typing import Any

import pytest
from minimal_config import minimal

from rlsys.config.files import parse_config
from rlsys.config.objective import KlConfig
from rlsys.errors import ConfigError

DEMONSTRATIONS: dict[str, Any] = {"policy": {"weight": 0.0}, "sft": {"weight": 1.0, "source": "demonstrations"}}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"policy": {"estimator": "gae"}}, "policy.estimator gae needs a critic: set value.weight above 0"),
        ({"value": {"weight": 0.5}}, "value.weight is for policy.estimator gae, found grpo"),
        (
            {"policy": {"estimator": "gae", "weight": 0.0}, "value": {"weight": 0.5}},
            "value.weight trains a critic for the policy term, whose policy.weight is 0",
        ),
        ({"value": {"warmup_steps": 3}}, "value.warmup_steps is for a critic: set value.weight above 0"),
        ({"preference": {"label_smoothing": 0.5}}, "objective.preference.label_smoothing: "),
        ({"preference": {"label_smoothing": -0.1}}, "objective.preference.label_smoothing: "),
        ({"preference": {"loss": "ipo", "label_smoothing": 0.1}}, "preference.label_smoothing"),
        ({"preference": {"loss": "ipo", "adaptive_smoothing": True}}, "adaptive_smoothing are for loss dpo"),
        ({"preference": {"beta": 0.0}}, "objective.preference.beta: "),
        ({"policy": {"weight": -1.0}}, "objective.policy.weight: "),
        ({"policy": {"surrogate": "gspo", "dual_clip": 3.0}}, "policy.dual_clip needs policy.surrogate clip"),
        ({"policy": {"surrogate": "cispo", "dual_clip": 3.0}}, "policy.dual_clip needs policy.surrogate clip"),
        (
            {**DEMONSTRATIONS, "kl": {"weight": 0.1}},
            "kl.weight has no effect: it covers the policy term's tokens, and policy.weight is 0",
        ),
        ({**DEMONSTRATIONS, "kl": {"final_weight": 0.1}}, "kl.weight has no effect"),
        (
            {"distill": {"interpolation": 0.4, "interpolation_rate": 5e-4}},
            "interpolation_rate needs a final_interpolation above interpolation",
        ),
        (
            {"distill": {"interpolation": 0.4, "final_interpolation": 0.4, "interpolation_rate": 5e-4}},
            "interpolation_rate needs a final_interpolation above interpolation",
        ),
        ({"kl": {"in_reward": True}}, "kl.in_reward has no effect with kl.weight 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(minimal(objective=objective, search={"fraction": 1.0}), "c.yaml")
    assert "\n" not in caught.value.message
    assert message in caught.value.message


@pytest.mark.parametrize(
    "objective",
    [
        {"preference": {"loss": "ipo"}},
        {"preference": {"label_smoothing": 0.499}},
        {"policy": {"dual_clip": 3.0}},
        {"policy": {"estimator": "gae"}, "value": {"weight": 0.5, "warmup_steps": 3}, "kl": {"weight": 0.1}},
    ],
)
def test_settings_that_agree_are_accepted(objective: dict[str, Any]) -> None:
    parse_config(minimal(objective=objective), "c.yaml")


def test_a_weight_approaches_its_final_one_linearly() -> None:
    # 0.2 to 0.8 over steps 0..3: 0.2 more each time; past the end it stays.
    rising = KlConfig(weight=0.2, final_weight=0.8)
    assert [rising.weight_at(step, 4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8], rel=1e-12)
    falling = KlConfig(weight=0.5, final_weight=0.0)
    assert [falling.weight_at(step, 3) for step in range(3)] == [0.5, 0.25, 0.0]
    assert KlConfig(weight=0.2).weight_at(2, 4) == 0.2
    assert rising.weight_at(0, 1) == 0.8  # the only step is the last one
    assert falling.used and KlConfig(final_weight=0.1).used
    assert not KlConfig().used and not KlConfig(final_weight=0.0).used
