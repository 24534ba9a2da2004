"""The plan of a stage: its settings, its reference policy and the weights of its terms."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from minimal_config import minimal

from rlsys.config.files import parse_config
from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import OptimizerConfig
from rlsys.config.stages import TERMS, StageSettings, stage_plan, stage_plans, term_weights
from rlsys.types import StageName

ALL_TERMS: dict[str, Any] = {
    "policy": {"weight": 1.0, "estimator": "gae"},
    "kl": {"weight": 0.1},
    "value": {"weight": 0.5, "warmup_steps": 2},
    "preference": {"weight": 0.3},
    "sft": {"weight": 0.7},
    "distill": {"weight": 0.2},
    "ranking": {"weight": 0.4},
    "custom": {"weight": 0.6, "fn": "mine.py:loss"},
}


def weights(stage: StageName, step: int = 9, steps: int = 11, **changes: dict[str, Any]) -> dict[str, float]:
    settings = StageSettings(stage=stage, steps=steps, updates_per_step=1, optimizer=OptimizerConfig())
    return term_weights(ObjectiveConfig(**{**ALL_TERMS, **changes}), settings, step)


@pytest.mark.parametrize(
    ("objective", "others", "expected"),
    [
        ({}, {}, False),
        ({"kl": {"weight": 0.1}}, {}, True),
        ({"kl": {"final_weight": 0.1}}, {}, True),
        ({"kl": {"weight": 0.1, "final_weight": 0.0}}, {}, True),
        ({"preference": {"weight": 1.0}}, {"search": {"fraction": 0.5}}, True),
        # The pairs of a file are scored before the stage.
        ({"preference": {"weight": 1.0, "source": "file"}}, {"preference": {"path": "p"}}, False),
        ({"kl": {"weight": 0.1}}, {"stages": ["warm_start"]}, False),
        ({"distill": {"weight": 0.1, "divergence": "whole"}}, {}, True),
        ({"distill": {"weight": 0.1, "divergence": "whole"}}, {"teacher": {"in_learner": "t"}}, False),
    ],
)
def test_the_online_stage_keeps_a_reference_policy_where_a_term_needs_it(
    objective: dict[str, Any], others: dict[str, Any], expected: bool
) -> None:
    config = parse_config(minimal(objective=objective, **others), "c.yaml")
    assert any(plan.keeps_reference for plan in stage_plans(config)) is expected


def test_terms_by_stage() -> None:
    for stage in get_args(StageName):
        expected: dict[str, float] = {
            "warm_start": {"sft": 1.0},
            "sft": {"sft": 1.0},
            "search": {},
            "preference": {"preference": 0.3, "sft": 0.7},
            "online": {
                "policy": 1.0,
                "kl": 0.1,
                "value": 0.5,
                "preference": 0.3,
                "sft": 0.7,
                "distill": 0.2,
                "ranking": 0.4,
                "custom": 0.6,
            },
        }[stage]
        assert weights(stage) == expected
        assert set(expected) <= set(TERMS)


def test_stages_of_rows_learn_from_a_teacher_with_a_share_over_rows() -> None:
    distill = {"weight": 0.2, "final_weight": 0.4, "divergence": "top_k", "on_policy_share": 0.5}
    for stage in ("warm_start", "sft"):
        found = weights(stage, 5, distill=distill)  # type: ignore[arg-type]
        assert found == {"sft": 1.0, "distill": pytest.approx(0.3)}


@pytest.mark.parametrize(
    ("changes", "kinds", "scored"),
    [
        ({}, [], False),
        ({"distill": {"on_policy_share": 0.5}, "sft": {"source": "demonstrations"}}, ["demonstrations"], True),
        ({"distill": {"on_policy_share": 0.5}, "sft": {"source": "file"}}, ["rows"], True),
        ({"distill": {}, "sft": {"weight": 1.0, "source": "file"}}, ["rows"], False),
    ],
)
def test_the_rows_of_the_online_stage_and_whether_a_teacher_scores_them(
    changes: dict[str, Any], kinds: list[str], scored: bool
) -> None:
    distill = {"weight": 1.0, "divergence": "top_k", **changes.get("distill", {})}
    sft = {"rows_per_step": 7, **changes.get("sft", {})}
    values = minimal(
        objective={"distill": distill, "sft": sft}, teacher={"model": {"path": "t"}}, sft={"path": "rows.jsonl"}
    )
    plan = stage_plan(parse_config(values, "c.yaml"), "online")
    assert [source.kind for source in plan.data] == kinds and plan.scores_rows is scored
    assert all((each.per_step, each.per_step_field) == (7, "objective.sft.rows_per_step") for each in plan.data)


def test_a_term_of_weight_zero_is_left_out() -> None:
    changes = {"preference": {"weight": 0.0}, "sft": {"weight": 0.0, "final_weight": 1.0}}
    assert weights("preference", 0, **changes) == {}
    assert weights("preference", 5, **changes) == {"sft": 0.5}
    assert weights("preference", 10, **changes) == {"sft": 1.0}
    # In the stages of demonstrations every weight is 1.
    assert weights("sft", 0, **changes) == weights("warm_start", 0, **changes) == {"sft": 1.0}


def test_the_policy_term_is_left_out_while_the_critic_warms_up() -> None:
    others = {"preference": 0.3, "sft": 0.7}
    assert weights("online", 1) == {"value": 0.5, **others, "distill": 0.2, "ranking": 0.4}
    assert weights("online", 2) == {
        **others,
        **{"policy": 1.0, "kl": 0.1, "value": 0.5, "distill": 0.2, "ranking": 0.4, "custom": 0.6},
    }
    assert weights("preference", 0) == others


def test_kl_is_a_term_only_together_with_the_policy() -> None:
    assert "kl" not in weights("online", kl={"weight": 0.1, "in_reward": True})
    # Without a policy term there is no KL term.
    fading = {"policy": {"weight": 1.0, "final_weight": 0.0, "estimator": "gae"}}
    assert "kl" in weights("online", 9, **fading)
    assert not {"kl", "policy"} & set(weights("online", 10, **fading))


def test_settings_of_a_stage() -> None:
    values = minimal(
        objective={"policy": {"estimator": "gae"}, "value": {"weight": 0.5}},
        stages=["warm_start", "online"],
        train={"max_steps": 5, "updates_per_step": 3, "critic_optimizer": {"learning_rate": 0.5}},
        warm_start={"max_steps": 7},
    )
    config = parse_config(values, "c.yaml")
    assert [stage_plan(config, stage).steps for stage in ("warm_start", "search", "online")] == [7, 0, 5]
    online, warm = stage_plan(config, "online").settings, stage_plan(config, "warm_start").settings
    assert (online.steps, online.updates_per_step, online.total_updates) == (5, 3, 15)
    assert online.critic is not None and online.critic.learning_rate == 0.5
    assert (warm.steps, warm.updates_per_step, warm.total_updates, warm.critic) == (7, 1, 7, None)
    assert stage_plan(parse_config(minimal(), "c.yaml"), "online").settings.critic is None
    assert stage_plan(config, "search").settings.steps == 1


def test_only_the_last_offline_stage_publishes() -> None:
    config = parse_config(minimal(stages=["warm_start", "sft"], sft={"path": "rows.jsonl"}), "test")
    assert [plan.publishes for plan in stage_plans(config)] == ["never", "at its end"]
    assert stage_plan(config, "online").publishes == "every step"


def test_progress_counts_trees_of_the_stage_search_and_steps_of_the_others() -> None:
    config = parse_config(minimal(stages=["search", "sft"], search={"prompts": 7}, sft={"max_steps": 3}), "test")
    assert [plan.progress_total for plan in stage_plans(config)] == [7, 3]
    assert [plan.terms for plan in stage_plans(config)] == [(), ("sft", "distill")]
