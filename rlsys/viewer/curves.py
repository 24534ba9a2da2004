"""The curves of a run: metrics over weight versions, thinned to what a screen can show."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.run.charts import CHARTS
from rlsys.run.metrics import METRICS, spec_of

POINTS = 500
"""Largest number of points of a curve."""
VERSION = "weights/version"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric of one or two runs.

    Attributes:
        last: the last value in each run, as text; "" without one.
    """

    name: str
    meaning: str
    unit: str
    last: tuple[str, ...]


def curve_groups(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str, list[Curve]]]:
    """Return the curves under their headings: those of TensorBoard's charts, then all others by their first part."""
    names = {name for rows in runs for row in rows for name in row} - {"stage", "step", VERSION}
    order = {name: number for number, name in enumerate(METRICS)}
    left = sorted(names, key=lambda name: (order.get(name, len(order)), name))
    groups: dict[str, list[str]] = {}
    for title, charts in CHARTS.items():
        for pattern in (pattern for patterns in charts.values() for pattern in patterns):
            groups.setdefault(title, []).extend(name for name in left if re.fullmatch(pattern, name))
            left = [name for name in left if name not in groups[title]]
    for name in left:
        groups.setdefault(f"{name.partition('/')[0]}/", []).append(name)
    return [(title, [_curve(name, runs) for name in members]) for title, members in groups.items() if members]


def _curve(name: str, runs: Sequence[Sequence[Mapping[str, Any]]]) -> Curve:
    spec = spec_of(name)
    last = tuple(shown_number(next((row[name] for row in reversed(rows) if name in row), None)) for rows in runs)
    unit = spec.unit if spec and spec.unit != "1" else ""
    meaning = spec.meaning if spec else "a metric that this rlsys does not know"
    return Curve(name=name, meaning=meaning, unit=unit, last=last)


def curve_points(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the points of all curves: x values that the runs share, and the mean values there."""
    versions = [int(row[VERSION]) for rows in runs for row in rows if VERSION in row]
    if not versions:
        return {"x": [], "runs": [{} for _ in runs], "width": 1}
    low, width = min(versions), max(1, math.ceil((max(versions) - min(versions) + 1) / POINTS))
    buckets = sorted({(version - low) // width for version in versions})
    places = {bucket: number for number, bucket in enumerate(buckets)}

    def place(row: Mapping[str, Any]) -> int:
        return places[(int(row[VERSION]) - low) // width]

    curves = [_means(rows, place, len(buckets)) for rows in runs]
    return {"x": [low + bucket * width + (width - 1) / 2 for bucket in buckets], "runs": curves, "width": width}


def _means(
    rows: Sequence[Mapping[str, Any]], place: Callable[[Mapping[str, Any]], int], count: int
) -> dict[str, list[float | None]]:
    """Return the mean of every metric in each of `count` places; None in places without a value."""
    sums: dict[str, list[float]] = {}
    numbers: dict[str, list[int]] = {}
    for row in rows:
        if VERSION not in row:
            continue
        here = place(row)
        for name, value in row.items():
            if name in ("stage", "step", VERSION) or not math.isfinite(value):
                continue
            if name not in sums:
                sums[name], numbers[name] = [0.0] * count, [0] * count
            sums[name][here] += value
            numbers[name][here] += 1
    return {
        name: [
            float(f"{total / number:.6g}") if number else None
            for total, number in zip(totals, numbers[name], strict=True)
        ]
        for name, totals in sums.items()
    }


def shown_number(value: float | None) -> str:
    """Return a number as people read it; "" for None."""
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
