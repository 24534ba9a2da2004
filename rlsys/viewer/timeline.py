"""The time of the steps: what the learner did or waited for, and how busy the actors were meanwhile."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.run.step_times import (
    PARTS,
    Row,
    bottleneck,
    idle_shares,
    is_timed,
    part_seconds,
    part_shares,
    rollout_seconds,
)
from rlsys.run.throughput import last_steps

BINS = 100
"""Largest number of columns; more steps are summed up in groups."""
_TALL = 2.5  # times the median column


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
        measured: number of the last steps that `bottleneck` is about.
        bottleneck: a sentence about who waits for whom, as in `rlsys status`.
        height: seconds that the picture is high. A few much longer columns, as with an evaluation, are cut off.
        cut: number of these columns.
    """

    stage: str
    steps: int
    columns: Sequence[Column]
    shares: Mapping[str, float]
    idle: Mapping[str, float]
    measured: int
    bottleneck: str
    height: float
    cut: int


def timelines(rows: Sequence[Row], *, overlapping: bool) -> list[Timeline]:
    """Return the timeline of every stage that has steps, the newest stage first.

    Args:
        overlapping: see `rlsys.run.step_times.bottleneck`.
    """
    stages: dict[str, list[Row]] = {}
    for row in filter(is_timed, rows):
        stages.setdefault(row["stage"], []).append(row)
    return [_timeline(stage, steps, overlapping) for stage, steps in reversed(stages.items())]


def _timeline(stage: str, rows: Sequence[Row], overlapping: bool) -> Timeline:
    size = math.ceil(len(rows) / BINS)
    columns = [_column(rows[start : start + size]) for start in range(0, len(rows), size)]
    seconds = [column.seconds for column in columns]
    height = min(max(seconds), _TALL * statistics.median(seconds)) or 1.0
    last = last_steps(rows)
    return Timeline(
        stage=stage,
        steps=len(rows),
        columns=columns,
        shares=part_shares(rows),
        idle=idle_shares(rows),
        measured=len(last),
        bottleneck=bottleneck(last, overlapping=overlapping),
        height=height,
        cut=sum(each > height for each in seconds),
    )


def _column(rows: Sequence[Row]) -> Column:
    parts = [part_seconds(row) for row in rows]
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


def _busy(row: Row) -> float:
    """Return the busy seconds of the engines in a step. Their idle share leaves the evaluation out."""
    own = rollout_seconds(row)
    return (1 - float(row["rollout/idle_policy"])) * own + float(row["time/step_s"]) - own
