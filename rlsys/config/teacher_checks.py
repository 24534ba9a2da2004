"""Check the rules of the teacher (section teacher, objective.distill)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsys.config.schema import Config


def distillation_has_a_teacher(config: Config) -> None:
    """Raise if the term distill has no teacher, or a teacher no term."""
    used, model = config.objective.distill.used, config.teacher.model
    if used and model is None:
        raise ValueError("objective.distill.weight needs a teacher: set teacher.model.path")
    if model is not None and not used:
        raise ValueError("teacher.model has no effect: raise objective.distill.weight, or leave teacher out")
    if used and "online" not in config.stages:
        raise ValueError("objective.distill is a term of stage online: add online to stages, or leave distill out")


def teacher_scores_what_was_sampled(config: Config) -> None:
    """Raise if the teacher's scores would be of other distributions or sequences than the policy's."""
    model = config.teacher.model
    if model is None:
        return
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
    """Raise if a key of the divergence top_k is set for another one."""
    distill = config.objective.distill
    defaults = type(distill)()
    changed = [name for name in ("top_k", "beta") if getattr(distill, name) != getattr(defaults, name)]
    if distill.divergence != "top_k" and changed:
        raise ValueError(
            f"objective.distill.{changed[0]} is for divergence top_k, found {distill.divergence}: leave it out"
        )
