"""Check the rules of the teacher (section teacher, objective.distill)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.config.stages import StagePlan, stage_plans

if TYPE_CHECKING:
    from rlsys.config.schema import Config

DIVERGENCE_KEYS = (
    "top_k",
    "on_policy_share",
    "beta",
    "interpolation",
    "final_interpolation",
    "interpolation_rate",
    "teacher_temperature",
    "confidence_gate",
    "entropy_coef",
    "entropy_share",
)
WHOLE_KEYS = ("beta", "on_policy_share", "interpolation", "final_interpolation", "interpolation_rate")


def distillation_has_a_teacher(config: Config) -> None:
    """Raise if a term that needs a teacher has none, or a teacher has no term."""
    objective, model = config.objective, config.teacher.model
    field = "objective.distill.weight" if objective.distill.used else "objective.policy.teacher_share"
    plans = stage_plans(config)
    chains = objective.scores_chains and "online" in config.stages
    whole = objective.distill.divergence == "whole"
    unscored = objective.distill.on_rows and not whole and any(map(_has_unscored_rows, plans))
    if model is None and (chains or unscored):
        raise ValueError(f"{field} needs a teacher: set teacher.model.path")
    if model is not None and not objective.asks_a_teacher:
        raise ValueError(
            "teacher.model has no effect: raise objective.distill.weight or objective.policy.teacher_share, or leave "
            "teacher out"
        )
    if config.teacher.in_learner and not any(plan.settings.whole_teacher for plan in plans):
        raise ValueError(
            "teacher.in_learner has no effect: set objective.distill.divergence to whole and raise "
            "objective.distill.weight, or leave it out"
        )
    if model is not None and "online" not in config.stages and not any(plan.scores_rows for plan in plans):
        raise ValueError(
            "teacher.model serves stage online, and warm_start and sft with objective.distill.on_policy_share below 1: "
            "add online to stages, lower the share, or leave teacher out"
        )


def _has_unscored_rows(plan: StagePlan) -> bool:
    """Return whether a stage trains rows that no file can have scored."""
    rows = plan.source("rows")
    return plan.source("demonstrations") is not None or (rows is not None and rows.extracted)


def distilled_rows_have_a_source(config: Config) -> None:
    """Raise if the term distill has a share over rows in the stage `online` and no rows."""
    objective = config.objective
    if "online" not in config.stages:
        return
    if objective.distill.on_rows and objective.sft.source not in ("demonstrations", "file"):
        raise ValueError(
            "objective.distill.on_policy_share below 1 needs rows in stage online: set objective.sft.source to "
            f"demonstrations or file, found {objective.sft.source}"
        )
    rows = objective.sft.used or objective.distill.on_rows
    before = config.stages[: config.stages.index("online")]
    if rows and objective.sft.source == "file" and not config.sft.path and "search" not in before:
        raise ValueError("objective.sft.source file needs sft.path, or a stage search before")


def teacher_scores_what_was_sampled(config: Config) -> None:
    """Raise if the teacher's scores would be of other distributions or sequences than the policy's."""
    model, distill = config.teacher.model, config.objective.distill
    if model is None:
        return
    if distill.on_chains and distill.divergence == "sampled" and config.sampling.top_p < 1:
        raise ValueError(
            "objective.distill.divergence sampled compares the policy with the distribution that was sampled from: set "
            f"sampling.top_p to 1, found {config.sampling.top_p:g}"
        )
    if config.sampling.temperature != 1:
        raise ValueError(
            f"teacher.model scores tokens at temperature 1: set sampling.temperature to 1, found "
            f"{config.sampling.temperature:g}"
        )
    if model.max_model_len < config.actors.max_model_len:
        raise ValueError(
            f"teacher.model.max_model_len {model.max_model_len} is below actors.max_model_len "
            f"{config.actors.max_model_len}: the teacher could not score the longest sequences"
        )


def divergence_has_its_keys(config: Config) -> None:
    """Raise if a key has no effect: those of the divergence top_k for another one, and entropy_share alone."""
    distill = config.objective.distill
    defaults, names = type(distill)(), DIVERGENCE_KEYS
    changed = [name for name in names if getattr(distill, name) != getattr(defaults, name)]
    if distill.divergence == "whole":
        changed = [name for name in changed if name not in WHOLE_KEYS]
    if distill.divergence != "top_k" and changed:
        raise ValueError(
            f"objective.distill.{changed[0]} is for divergence top_k, found {distill.divergence}: leave it out"
        )
    if not distill.entropy_coef and distill.entropy_share != defaults.entropy_share:
        raise ValueError(
            "objective.distill.entropy_share has no effect: raise objective.distill.entropy_coef, or leave it out"
        )


def whole_teacher_fits(config: Config) -> None:
    """Raise if the learner cannot hold a teacher of the whole vocabulary."""
    learner = config.learner
    if config.objective.distill.divergence != "whole" or not config.objective.distill.used:
        return
    wrong = {
        "learner.zero_stage below 3": learner.zero_stage == 3,
        "learner.sequence_parallel 1": learner.sequence_parallel > 1,
        "a policy without model.lora": config.model.lora is not None,
        "objective.sft.mask_share 0, because the teacher reads what the policy reads": config.objective.sft.mask_share
        and config.objective.distill.on_rows,
    }
    if needed := next((name for name, is_wrong in wrong.items() if is_wrong), None):
        raise ValueError(f"objective.distill.divergence whole needs {needed}")
