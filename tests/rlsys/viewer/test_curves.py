"""Curves: their order, their meaning, and points that keep the mean."""

from __future__ import annotations

import math
from typing import Any

from rlsys.run.metrics import METRICS
from rlsys.viewer.curves import POINTS, curve_groups, curve_points, shown_number


def row(version: int, **metrics: float) -> dict[str, Any]:
    return {"stage": "online", "step": version, "weights/version": version, **metrics}


def test_the_charts_of_tensorboard_come_first_and_others_stay_under_their_first_part() -> None:
    names = ("new/thing", "learner/loss", "learner/kl", "rollout/reward", "rollout/reward_low", "time/step_s")
    groups = curve_groups([[row(1, **dict.fromkeys(names, 0.1))]])
    assert [(title, [curve.name for curve in curves]) for title, curves in groups] == [
        ("Progress", ["rollout/reward"]),
        ("Health", ["learner/kl"]),
        ("Losses", ["learner/loss"]),
        ("Time", ["time/step_s"]),
        ("rollout/", ["rollout/reward_low"]),
        ("new/", ["new/thing"]),
    ]
    reward, step, new = groups[0][1][0], groups[3][1][0], groups[5][1][0]
    assert reward.meaning.startswith("mean reward") and reward.last == ("0.1",)
    assert step.unit == "s" and "does not know" in new.meaning


def test_every_metric_has_one_curve() -> None:
    groups = curve_groups([[row(1, **dict.fromkeys(METRICS, 0.0))]])
    names = [curve.name for _, curves in groups for curve in curves]
    assert sorted(names) == sorted(set(METRICS) - {"weights/version"})


def test_no_rows_give_no_curves() -> None:
    assert curve_groups([[], []]) == []
    assert curve_points([[]]) == {"x": [], "runs": [{}], "width": 1}


def test_few_points_stay_as_they_are() -> None:
    points = curve_points([[row(3, a=1.0), row(4, b=2.0)]])
    assert points == {"x": [3, 4], "runs": [{"a": [1.0, None], "b": [None, 2.0]}], "width": 1}


def test_many_points_become_means_that_keep_the_mean() -> None:
    rows = [row(version, a=float(version)) for version in range(1, 4 * POINTS + 1)]
    points = curve_points([rows])
    values = points["runs"][0]["a"]
    assert len(values) == len(points["x"]) == POINTS and points["width"] == 4
    assert points["x"][0] == values[0] == 2.5
    assert math.isclose(sum(values) / POINTS, (4 * POINTS + 1) / 2)


def test_two_runs_share_the_axis() -> None:
    points = curve_points([[row(1, a=1.0)], [row(2, a=5.0)]])
    assert points["x"] == [1, 2] and points["runs"] == [{"a": [1.0, None]}, {"a": [None, 5.0]}]


def test_numbers_are_short() -> None:
    assert [shown_number(value) for value in (None, 3.0, 12345.0, 12345.67, 0.123456, 1e-7)] == [
        "", "3", "12,345", "12,345.7", "0.1235", "1e-07",
    ]  # fmt: skip
