"""Parts of the time of training steps, idle shares of the engines, and a sentence about who waits for whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
PARTS = {
    "wait": ("time/rollout_s", "waiting for trajectories"),
    "learn": ("time/learn_s", "learning"),
    "publish": ("time/publish_s", "waiting for publishes"),
    "evaluate": ("time/evaluate_s", "evaluating"),
    "checkpoint": ("time/checkpoint_s", "saving"),
    "rest": ("", "rest"),
}
"""What the learner's time is made of: metric and name of each part."""
ROLES = {
    "rollout/idle_policy": "actors",
    "rollout/idle_model": "engines of search.model",
    "rollout/idle_reviewer": "engines of search.reviewer",
    "rollout/idle_judge": "engines of search.value",
    "rollout/idle_teacher": "engines of teacher.model",
}
_NOTABLE = 0.05  # a smaller share is not worth a word


def is_timed(row: Row) -> bool:
    """Return whether a row is of a training step with its time."""
    return bool(row["step"] and row.get("time/step_s"))


def part_seconds(row: Row) -> dict[str, float]:
    """Return the seconds of every part of a step."""
    parts = {part: max(0.0, float(row.get(name) or 0.0)) for part, (name, _) in PARTS.items() if name}
    return {**parts, "rest": max(0.0, float(row["time/step_s"]) - math.fsum(parts.values()))}


def part_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of every part in the time of some steps."""
    seconds = [part_seconds(row) for row in rows]
    sums = {part: math.fsum(each[part] for each in seconds) for part in PARTS}
    total = math.fsum(sums.values()) or 1.0
    return {part: own / total for part, own in sums.items()}


def rollout_seconds(row: Row) -> float:
    """Return the seconds of a step without its evaluation, to which the idle shares of the engines refer."""
    return max(0.0, float(row["time/step_s"]) - float(row.get("time/evaluate_s") or 0.0))


def idle_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Return the idle share of the engines of each role over some steps; none of roles without engines."""
    shares = {}
    for name, role in ROLES.items():
        measured = [(row[name], rollout_seconds(row)) for row in rows if row.get(name) is not None]
        total = math.fsum(seconds for _, seconds in measured)
        if total:
            shares[role] = math.fsum(share * seconds for share, seconds in measured) / total
    return shares


def bottleneck(rows: Sequence[Row], *, overlapping: bool) -> str:
    """Return one sentence about the part that limits the run.

    Args:
        rows: some steps of a stage.
        overlapping: whether actors and learner work at the same time, as with train.max_staleness above 0.
    """
    shares, idle = part_shares(rows), idle_shares(rows).get("actors")
    if idle is None:
        return f"the learner works {shares['learn']:.0%} of the time, and no actor takes part"
    side = max(("publish", "checkpoint", "evaluate"), key=lambda name: shares[name])
    if shares[side] > max(shares["wait"], shares["learn"]):
        names = {"publish": "publishes", "checkpoint": "checkpoints", "evaluate": "evaluations"}
        return f"{names[side]} take {shares[side]:.0%} of the time, more than generation and learning"
    waits = f"the learner waits for trajectories {shares['wait']:.0%} of the time, the actors are idle {idle:.0%}"
    if not overlapping:
        slower = "generation" if shares["wait"] >= shares["learn"] else "learning"
        return f"{slower}: {waits}; they take turns, as train.max_staleness is 0"
    if max(shares["wait"], idle) < _NOTABLE:
        return f"none: {waits}"
    if shares["wait"] >= idle:
        return f"generation: {waits}; more actors or shorter completions help"
    return f"learning: {waits}; more learner ranks help, or fewer actors"
