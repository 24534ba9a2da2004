"""Warnings about settings that are a risk but may be meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlsys.config.stages import stage_plans

if TYPE_CHECKING:
    from rlsys.config.schema import Config

WARNING = "warning: "
"""Beginning of a note that a user should read before a run."""
LARGE_SEQUENCE_CLIP = 0.05
"""Bound of the surrogate gspo that is worth a warning: a hundred times the paper's, 3e-4 and 4e-4."""


def sequence_ratios_are_clipped(config: Config) -> str | None:
    """Warn if the bounds of the sequence ratio are as wide as those of a token's ratio."""
    policy = config.objective.policy
    if "online" not in config.stages or not policy.used or policy.surrogate != "gspo":
        return None
    if max(policy.clip_low, policy.clip_high) < LARGE_SEQUENCE_CLIP:
        return None
    return (
        f"objective.policy.surrogate gspo with clip_low {policy.clip_low:g} and clip_high {policy.clip_high:g}: the "
        "ratio of a sequence is a mean over its tokens and hardly ever gets there, so nothing is clipped; the paper "
        "has 3e-4 and 4e-4"
    )


def shared_rows_hold_one_sample(config: Config) -> str | None:
    """Warn if ranks share rows, because such rows cannot share the beginnings of samples."""
    size = config.learner.sequence_parallel
    if size == 1 or not any(plan.trains for plan in stage_plans(config)):
        return None
    return (
        f"learner.sequence_parallel {size}: every sample has a row of its own, so the learner computes a prompt again "
        "for every completion; use it only if samples are too long for one rank"
    )


def rows_fit_micro_batch(config: Config) -> str | None:
    """Warn if a row can have more tokens than a pass of the learner should have."""
    learner, longest = config.learner, config.actors.max_model_len
    budget, size = learner.micro_batch_tokens, learner.sequence_parallel
    if budget * size >= longest or not any(plan.trains for plan in stage_plans(config)):
        return None
    shared = f" / learner.sequence_parallel {size}" if size > 1 else ""
    return (
        f"learner.micro_batch_tokens {budget} is below actors.max_model_len {longest}{shared}: a longer row is a pass "
        f"of its own and needs the memory of up to {-(-longest // size)} tokens; raise the former or lower the latter"
    )


WARNINGS: tuple[Callable[[Config], str | None], ...] = (
    sequence_ratios_are_clipped,
    shared_rows_hold_one_sample,
    rows_fit_micro_batch,
)
"""Checks of settings that are a risk but may be meant. Each returns one line that names the fields, or None."""


def warnings(config: Config) -> list[str]:
    """Return the warnings about the settings of a training run, one line each."""
    return [f"{WARNING}{text}" for check in WARNINGS if (text := check(config))]
