"""The last held-out figures of a run, and their line."""

from __future__ import annotations

from rlsys.run.held_out import FIGURES, figures_text, last_figures
from rlsys.run.metrics import METRICS


def test_the_figures_are_those_of_one_evaluation() -> None:
    rows = [
        {"weights/version": 0, "held_out/greedy_accuracy": 0.25, "held_out/sampled_accuracy": 0.125},
        {"weights/version": 10, "held_out/greedy_accuracy": 0.5},  # only this part was asked for since
        {"weights/version": 11},
    ]
    assert last_figures(rows) == {"greedy accuracy": 0.5, "weight version": 10}
    assert figures_text(last_figures(rows)) == "greedy accuracy 0.500 (weight version 10)"
    assert figures_text(last_figures(rows[2:])) == "not measured"
    assert set(FIGURES) <= set(METRICS)
