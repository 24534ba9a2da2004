"""The joint objective's settings: what cannot work is refused by name, and which terms a step has follows from them."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest

from rlsys.config.files import parse_config
from rlsys.config.objective import KlConfig, ObjectiveConfig
from rlsys.config.schema import Config, OptimizerConfig
from rlsys.config.stages import TERMS, StageSettings, stage_plan, term_weights
from rlsys.errors import ConfigError
from rlsys.types import StageName

MINIMAL: dict[str, Any] = {"run": {"dir": "r"}, "model": {"path": "m"}, "task": {"type": "letter_count"}}
SEARCHED = {"search": {"fraction": 0.5}}
WHOLE = {"search": {"fraction": 1.0}}
PAIRS = {"preference": {"weight": 1.0}}
DEMONSTRATIONS = {"policy": {"weight": 0.0}, "sft": {"weight": 1.0, "source": "demonstrations"}}
HANDED_OVER = {"weight": 1.0, "final_weight": 0.0, "source": "demonstrations"}


def config(objective: dict[str, Any] | None = None, **others: Any) -> Config:
    return parse_config({**copy.deepcopy(MINIMAL), "objective": objective or {}, **others}, "c.yaml")


def gae(**changes: Any) -> dict[str, Any]:
    return {"policy": {"estimator": "gae"}, "value": {"weight": 0.5}, **changes}


@pytest.mark.parametrize(
    ("objective", "others", "found"),
    [
        ({"policy": {"weight": 0}}, {}, "objective.policy, objective.preference and objective.sft are all 0"),
        (PAIRS, {}, "objective.preference.weight has no pairs in stage online: set search.fraction above 0"),
        (
            {"sft": {"weight": 1.0}},
            {},
            "objective.sft.weight with source chosen has no pairs in stage online: set search.fraction above 0",
        ),
        (PAIRS, {**SEARCHED, "extract": {"chosen": "none"}}, "extract.chosen leaves them out"),
        (
            {"preference": {"weight": 1.0, "pairs": "steps"}},
            {**SEARCHED, "extract": {"step_preferences": False}},
            "extract.step_preferences leaves them out",
        ),
        ({"preference": {"weight": 1.0, "source": "file"}}, {}, "source file needs preference.path, or a stage search"),
        ({"sft": {"weight": 1.0, "source": "trees"}}, {}, "objective.sft.source trees needs search.fraction above 0"),
        (
            {"sft": {"weight": 1.0, "source": "trees"}},
            {**SEARCHED, "extract": {"supervised": "none"}},
            "objective.sft.source trees needs search.fraction above 0 and extract.supervised",
        ),
        ({"policy": {"estimator": "gae"}}, {}, "policy.estimator gae needs a critic: set value.weight above 0"),
        ({"value": {"weight": 0.5}}, {}, "value.weight is for policy.estimator gae, found grpo"),
        (
            {**gae(), "policy": {"estimator": "gae", "weight": 0.0}},
            {},
            "value.weight trains a critic for the policy term, whose policy.weight is 0",
        ),
        ({"value": {"warmup_steps": 3}}, {}, "value.warmup_steps is for a critic: set value.weight above 0"),
        ({"preference": {"label_smoothing": 0.5}}, {}, "objective.preference.label_smoothing: "),
        ({"preference": {"label_smoothing": -0.1}}, {}, "objective.preference.label_smoothing: "),
        ({"preference": {"loss": "ipo", "label_smoothing": 0.1}}, {}, "preference.label_smoothing"),
        ({"preference": {"loss": "ipo", "adaptive_smoothing": True}}, {}, "adaptive_smoothing are for loss dpo"),
        ({"preference": {"beta": 0.0}}, {}, "objective.preference.beta: "),
        ({"policy": {"weight": -1.0}}, {}, "objective.policy.weight: "),
        ({"policy": {"surrogate": "gspo", "dual_clip": 3.0}}, {}, "policy.dual_clip needs policy.surrogate clip"),
        ({"policy": {"surrogate": "cispo", "dual_clip": 3.0}}, {}, "policy.dual_clip needs policy.surrogate clip"),
        (
            {"policy": {"overlong_buffer": 17}},
            {"sampling": {"max_tokens": 16}},
            "objective.policy.overlong_buffer 17 exceeds sampling.max_tokens 16",
        ),
        ({"policy": {"surrogate": "gspo"}}, SEARCHED, "search.fraction 0.5 needs objective.policy.surrogate clip"),
        (
            {"policy": {"aggregation": "sequence_mean"}},
            SEARCHED,
            "search.fraction 0.5 needs objective.policy.aggregation token_mean, found sequence_mean",
        ),
        (
            {"kl": {"weight": 0.1, "in_reward": True}},
            SEARCHED,
            "search.fraction 0.5 needs objective.kl.in_reward False, found True",
        ),
        (
            {**DEMONSTRATIONS, "kl": {"weight": 0.1}},
            WHOLE,
            "kl.weight has no effect: the term is of the policy term's tokens, and policy.weight is 0",
        ),
        ({**DEMONSTRATIONS, "kl": {"final_weight": 0.1}}, WHOLE, "kl.weight has no effect"),
        ({"kl": {"in_reward": True}}, {}, "kl.in_reward has no effect with kl.weight 0"),
        (
            DEMONSTRATIONS,
            {},
            "objective.policy.weight 0: the sampled prompts of stage online would train nothing; set search.fraction "
            "to 1 (now 0)",
        ),
        ({**PAIRS, "policy": {"weight": 0.0}}, SEARCHED, "set search.fraction to 1 (now 0.5)"),
        (
            gae(value={"weight": 0.5, "warmup_steps": 5}),
            {"train": {"max_steps": 5}},
            "objective.value.warmup_steps 5 leaves the policy no step of stage online: expected fewer than "
            "train.max_steps, 5",
        ),
        # A step in which every weight is 0.
        (
            {"policy": {"final_weight": 0.0}},
            {},
            "stage online: nothing is trained in its last step: raise final_weight of one of objective.policy, "
            "objective.value, objective.preference, objective.sft",
        ),
        ({"policy": {"final_weight": 0.0}}, {"train": {"max_steps": 1}}, "nothing is trained in its last step"),
        (
            {"policy": {"weight": 0.0, "final_weight": 1.0}},
            {},
            "stage online: nothing is trained in its first step: raise weight of one of objective.policy, ",
        ),
        (
            gae(value={"weight": 0.0, "final_weight": 0.5, "warmup_steps": 1}),
            {},
            "nothing is trained in its first step: raise weight of one of objective.value, objective.preference",
        ),
        (
            {"preference": {"weight": 1.0, "final_weight": 0.0}},
            {"stages": ["preference"], "preference": {"path": "p"}},
            "stage preference: nothing is trained in its last step: raise final_weight of one of objective.preference, "
            "objective.sft",
        ),
        (
            gae(),
            WHOLE,
            "objective.value.weight has no effect: the critic learns from sampled prompts alone, and search.fraction 1 "
            "leaves none; lower search.fraction",
        ),
        ({}, {"stages": ["online", "search"]}, "stage search trains nothing: let another follow"),
        ({}, {"stages": ["search", "online"]}, "stage search extracts what no stage after it reads"),
        (PAIRS, {"stages": ["search", "online"], **SEARCHED}, "stage search extracts what no stage after it reads"),
        (
            {"preference": {"source": "file"}},  # of weight 0
            {"stages": ["search", "warm_start", "online"]},
            "stage search extracts what no stage after it reads",
        ),
        (
            PAIRS,
            {**SEARCHED, "preference": {"path": "p"}},
            "preference.path is never read: stage online takes its pairs from the trees of the step; set "
            "objective.preference.source to file",
        ),
        ({"sft": {"weight": 1.0}}, {**SEARCHED, "preference": {"path": "p"}}, "preference.path is never read"),
        ({}, {"stages": ["sft"]}, "stage sft has no data: set sft.path, or put the stage search before it"),
        (PAIRS, {"stages": ["preference"]}, "stage preference has no data: set preference.path"),
        (
            PAIRS,
            {"stages": ["preference", "search", "online"], **SEARCHED},
            "stage preference has no data: set preference.path",
        ),
        (
            {},
            {"stages": ["preference"], "preference": {"path": "p"}},
            "stage preference: objective.preference.weight and objective.sft.weight are 0",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(objective: dict[str, Any], others: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(objective, **others)
    assert "\n" not in caught.value.message
    assert found in caught.value.message


@pytest.mark.parametrize(
    ("objective", "others"),
    [
        (gae(), {}),
        ({**gae(), "value": {"weight": 0.5, "warmup_steps": 3}}, {}),
        ({"policy": {"weight": 0.0, "final_weight": 1.0}}, {"train": {"max_steps": 1}}),  # the only step is the last
        ({"policy": {"weight": 0.0, "final_weight": 1.0}, "sft": HANDED_OVER}, {}),
        (gae(value={"weight": 0.5, "warmup_steps": 4}), {"train": {"max_steps": 5}}),
        (gae(value={"weight": 0.5, "warmup_steps": 99}), {"stages": ["warm_start"], "train": {"max_steps": 5}}),
        (PAIRS, SEARCHED),
        ({**PAIRS, "policy": {"weight": 0.0}}, WHOLE),
        ({"kl": {"final_weight": 0.1, "in_reward": True}}, {}),
        ({"policy": {"final_weight": 0.0}}, {"stages": ["warm_start"]}),
        ({"preference": {"weight": 1.0, "source": "file"}}, {"preference": {"path": "p"}}),
        ({"preference": {"weight": 1.0, "source": "file"}}, {"stages": ["search", "online"]}),
        (gae(), {"search": {"fraction": 0.75}}),
        (gae(), {"stages": ["warm_start"], **WHOLE}),
        # A part of a longer recipe, whose other stages have settings too.
        (PAIRS, {"stages": ["warm_start"], "preference": {"path": "p"}, "sft": {"path": "p"}}),
        ({}, {**SEARCHED, "preference": {"path": "p"}}),
        # A run is continued with files in place of what its search has extracted.
        (PAIRS, {"stages": ["search", "sft", "preference"], "preference": {"path": "p"}, "sft": {"path": "p"}}),
        (PAIRS, {"stages": ["preference", "online"], **SEARCHED, "preference": {"path": "p"}}),
        ({"preference": {"loss": "ipo"}}, {}),
        ({"preference": {"label_smoothing": 0.499}}, {}),
        ({"policy": {"surrogate": "cispo"}}, SEARCHED),
        # What the online stage could not train is nothing to a run without one.
        (PAIRS, {"stages": ["search", "preference"]}),
        ({"policy": {"overlong_buffer": 16}}, {"sampling": {"max_tokens": 16}}),
    ],
)
def test_what_works_is_taken(objective: dict[str, Any], others: dict[str, Any]) -> None:
    config(objective, **others)


@pytest.mark.parametrize(
    ("objective", "others", "expected"),
    [
        ({}, {}, False),
        ({"kl": {"weight": 0.1}}, {}, True),
        ({"kl": {"final_weight": 0.1}}, {}, True),
        ({"kl": {"weight": 0.1, "final_weight": 0.0}}, {}, True),
        (PAIRS, SEARCHED, True),
        # A file's pairs bring their scores, computed before the stage.
        ({"preference": {"weight": 1.0, "source": "file"}}, {"preference": {"path": "p"}}, False),
        ({"kl": {"weight": 0.1}}, {"stages": ["warm_start"]}, False),
    ],
)
def test_a_reference_policy_is_kept_where_something_asks_for_it(
    objective: dict[str, Any], others: dict[str, Any], expected: bool
) -> None:
    assert config(objective, **others).reference == expected


# --- weights ---


def test_a_weight_approaches_its_final_one_linearly() -> None:
    # 0.2 to 0.8 over steps 0..3: 0.2 more each time; past the end it stays.
    found = KlConfig(weight=0.2, final_weight=0.8)
    assert [found.weight_at(step, 4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8], rel=1e-12)
    falling = KlConfig(weight=0.5, final_weight=0.0)
    assert [falling.weight_at(step, 3) for step in range(3)] == [0.5, 0.25, 0.0]
    assert KlConfig(weight=0.2).weight_at(2, 4) == 0.2
    assert found.weight_at(0, 1) == 0.8  # the only step is the last one
    assert falling.used and KlConfig(final_weight=0.1).used
    assert not KlConfig().used and not KlConfig(final_weight=0.0).used


EVERY: dict[str, Any] = {
    "policy": {"weight": 1.0, "estimator": "gae"},
    "kl": {"weight": 0.1},
    "value": {"weight": 0.5, "warmup_steps": 2},
    "preference": {"weight": 0.3},
    "sft": {"weight": 0.7},
}


def weights(stage: StageName, step: int = 9, steps: int = 11, **changes: dict[str, Any]) -> dict[str, float]:
    settings = StageSettings(stage=stage, steps=steps, updates_per_step=1, optimizer=OptimizerConfig())
    return term_weights(ObjectiveConfig(**{**EVERY, **changes}), settings, step)


def test_terms_by_stage() -> None:
    for stage in get_args(StageName):
        expected: dict[str, float] = {
            "warm_start": {"sft": 1.0},
            "sft": {"sft": 1.0},
            "search": {},
            "preference": {"preference": 0.3, "sft": 0.7},
            "online": {"policy": 1.0, "kl": 0.1, "value": 0.5, "preference": 0.3, "sft": 0.7},
        }[stage]
        assert weights(stage) == expected
        assert set(expected) <= set(TERMS)


def test_a_term_of_weight_zero_is_left_out() -> None:
    changes = {"preference": {"weight": 0.0}, "sft": {"weight": 0.0, "final_weight": 1.0}}
    assert weights("preference", 0, **changes) == {}
    assert weights("preference", 5, **changes) == {"sft": 0.5}
    assert weights("preference", 10, **changes) == {"sft": 1.0}
    # The stages of demonstrations know no weight but 1.
    assert weights("sft", 0, **changes) == weights("warm_start", 0, **changes) == {"sft": 1.0}


def test_while_the_critic_warms_up_nothing_moves_the_policy_by_its_rewards() -> None:
    others = {"preference": 0.3, "sft": 0.7}
    assert weights("online", 1) == {"value": 0.5, **others}
    assert weights("online", 2) == {"policy": 1.0, "kl": 0.1, "value": 0.5, **others}
    assert weights("preference", 0) == others


def test_kl_is_a_term_beside_the_policy_alone() -> None:
    assert "kl" not in weights("online", kl={"weight": 0.1, "in_reward": True})
    # A policy term that fades out takes it along.
    fading = {"policy": {"weight": 1.0, "final_weight": 0.0, "estimator": "gae"}}
    assert "kl" in weights("online", 9, **fading)
    assert not {"kl", "policy"} & set(weights("online", 10, **fading))


def test_settings_of_a_stage() -> None:
    found = config(
        gae(),
        stages=["warm_start", "online"],
        train={"max_steps": 5, "updates_per_step": 3, "critic_optimizer": {"learning_rate": 0.5}},
        warm_start={"max_steps": 7},
    )
    online, warm = stage_plan(found, "online").settings, stage_plan(found, "warm_start").settings
    assert (online.steps, online.updates_per_step, online.total_updates) == (5, 3, 15)
    assert online.critic is not None and online.critic.learning_rate == 0.5
    assert (warm.steps, warm.updates_per_step, warm.total_updates, warm.critic) == (7, 1, 7, None)
    assert stage_plan(config(), "online").settings.critic is None
    assert stage_plan(found, "search").settings.steps == 1
