"""The last held-out figures of a run, from its rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = {
    "held_out/greedy_accuracy": "greedy accuracy",
    "held_out/sampled_accuracy": "sampled accuracy",
    "held_out/pass_at_k": "pass@k",
}
"""The metrics of an evaluation that are shown in one line, and their names."""


def last_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of the last evaluation by their names, with its `weight version`; none without one."""
    for row in reversed(rows):
        figures = {name: float(row[metric]) for metric, name in FIGURES.items() if row.get(metric) is not None}
        if figures:
            return {**figures, "weight version": int(row["weights/version"])}
    return {}


def figures_text(figures: Mapping[str, float]) -> str:
    """Return figures in a line; "not measured" without any."""
    if not figures:
        return "not measured"
    shares = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if name != "weight version")
    return f"{shares} (weight version {figures['weight version']:.0f})"
