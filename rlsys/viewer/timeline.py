"""The time of the steps: what the learner did or waited for, and how busy the actors were meanwhile."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BINS = 100
"""Largest number of columns; more steps are summed up in groups."""
_TALL = 2.5  # times the median column
PARTS = {
    "wait": ("time/rollout_s", "waits for rollouts"),
    "learn": ("time/learn_s", "learns"),
    "publish": ("time/publish_s", "waits for publishes"),
    "evaluate": ("time/evaluate_s", "evaluates"),
    "checkpoint": ("time/checkpoint_s", "saves"),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The mean step among neighbouring steps.

    Attributes:
        parts: seconds of each part.
        busy: busy seconds of the engines of the policy; None if it was not measured.
        publish: mean seconds of a publish, which may go on beside the next step; None if there was none.
        staleness: largest staleness of a trained group.
    """

    first: int
    last: int
    parts: Mapping[str, float]
    busy: float | None
    publish: float | None
    staleness: float | None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The steps of a stage.

    Attributes:
        shares: share of each part in all of the time.
        idle: idle share of the engines of each role.
        verdict: a sentence about who waits for whom.
        height: seconds that the picture is high. A few much longer columns, as with an evaluation, are cut off.
        cut: number of these columns.
    """

    stage: str
    steps: int
    columns: Sequence[Column]
    shares: Mapping[str, float]
    idle: Mapping[str, float]
    verdict: str
    height: float
    cut: int


def timelines(rows: Sequence[Mapping[str, Any]]) -> list[Timeline]:
    """Return the timeline of every stage that has steps, the newest stage first."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["step"] > 0 and "time/step_s" in row:
            stages.setdefault(row["stage"], []).append(row)
    return [_timeline(stage, steps) for stage, steps in reversed(stages.items())]


def _timeline(stage: str, rows: Sequence[Mapping[str, Any]]) -> Timeline:
    size = math.ceil(len(rows) / BINS)
    columns = [_column(rows[start : start + size]) for start in range(0, len(rows), size)]
    sums = {part: math.fsum(_parts(row)[part] for row in rows) for part in PARTS}
    total = math.fsum(sums.values()) or 1.0
    shares = {part: seconds / total for part, seconds in sums.items()}
    idle = {}
    for name, role in ROLES.items():
        if values := [row[name] for row in rows if name in row]:
            idle[role] = math.fsum(values) / len(values)
    seconds = [column.seconds for column in columns]
    height = min(max(seconds), _TALL * statistics.median(seconds)) or 1.0
    verdict = _verdict(shares, idle.get("actors"))
    return Timeline(
        stage=stage,
        steps=len(rows),
        columns=columns,
        shares=shares,
        idle=idle,
        verdict=verdict,
        height=height,
        cut=sum(each > height for each in seconds),
    )


def _parts(row: Mapping[str, Any]) -> dict[str, float]:
    parts = {part: max(0.0, float(row.get(name, 0.0))) for part, (name, _) in PARTS.items() if name}
    return {**parts, "rest": max(0.0, float(row["time/step_s"]) - math.fsum(parts.values()))}


def _column(rows: Sequence[Mapping[str, Any]]) -> Column:
    parts = [_parts(row) for row in rows]
    busy = [_busy(row) for row in rows if "rollout/idle_policy" in row]
    publishes = [row["weights/publish_s"] for row in rows if "weights/publish_s" in row]
    staleness = [row["rollout/staleness_max"] for row in rows if "rollout/staleness_max" in row]
    return Column(
        first=rows[0]["step"],
        last=rows[-1]["step"],
        parts={part: math.fsum(each[part] for each in parts) / len(rows) for part in PARTS},
        busy=math.fsum(busy) / len(busy) if busy else None,
        publish=math.fsum(publishes) / len(publishes) if publishes else None,
        staleness=max(staleness, default=None),
    )


def _busy(row: Mapping[str, Any]) -> float:
    """Return the busy seconds of the engines in a step. Their idle share leaves the evaluation out."""
    evaluation = float(row.get("time/evaluate_s", 0.0))
    return (1 - float(row["rollout/idle_policy"])) * max(0.0, float(row["time/step_s"]) - evaluation) + evaluation


def _verdict(shares: Mapping[str, float], idle: float | None) -> str:
    if idle is None:
        return f"The stage has no rollouts; the learner works for {shares['learn']:.0%} of the time."
    waits = f"The learner waits for rollouts for {shares['wait']:.0%} of the time"
    text = f"{waits} and learns for {shares['learn']:.0%}; the engines of the actors are idle for {idle:.0%}."
    if shares["wait"] > 0.5 and idle < 0.3:
        return f"{text} Rollouts are the bottleneck: more actors, or shorter completions."
    if shares["learn"] > 0.5 and idle > 0.3:
        return f"{text} The learner is the bottleneck: more learner ranks, or fewer actors."
    if shares["wait"] > 0.2 and idle > 0.3:
        return f"{text} They wait for each other: train.max_staleness lets the actors work ahead."
    return text
