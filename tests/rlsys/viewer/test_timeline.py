"""The time of the steps: parts that add up, columns of many steps, and who waits for whom."""

from __future__ import annotations

from typing import Any

import pytest
from resumable_runs import config

from rlsys.run.throughput import measure
from rlsys.viewer.timeline import BINS, timelines


def step(number: int, stage: str = "online", **seconds: float) -> dict[str, Any]:
    parts = {f"time/{name}_s": value for name, value in seconds.items() if name != "idle"}
    idle = {"rollout/idle_policy": seconds["idle"]} if "idle" in seconds else {}
    return {"stage": stage, "step": number, "weights/version": number, **parts, **idle}


def test_parts_add_up_to_the_step() -> None:
    rows = [step(0, evaluate=9.0), step(1, step=10.0, rollout=4.0, learn=3.0, publish=1.0, evaluate=1.5, idle=0.2)]
    rows[1]["weights/publish_s"] = 2.5  # it goes on beside the next step
    line = timelines(rows, overlapping=False)[0]
    column = line.columns[0]
    assert dict(column.parts) == {
        "wait": 4.0, "learn": 3.0, "publish": 1.0, "evaluate": 1.5, "checkpoint": 0.0, "rest": 0.5,
    }  # fmt: skip
    assert line.shares["wait"] == 0.4 and line.steps == 1
    assert column.publish == 2.5
    assert column.busy == pytest.approx(0.8 * 8.5 + 1.5)  # the idle share leaves the evaluation out


def test_many_steps_share_columns_and_a_long_one_is_cut_off() -> None:
    rows = [step(number, step=1.0, learn=1.0, idle=0.5) for number in range(1, 4 * BINS)]
    rows.append(step(4 * BINS, step=1000.0, learn=1.0, evaluate=999.0, idle=0.5))
    line = timelines(rows, overlapping=False)[0]
    assert len(line.columns) == BINS and (line.columns[0].first, line.columns[0].last) == (1, 4)
    assert line.height == 2.5 and line.cut == 1


@pytest.mark.parametrize("overlapping", [False, True])
def test_the_sentence_is_that_of_status(overlapping: bool) -> None:
    rows = [step(n, step=10.0, rollout=5.0 + n / 10, learn=4.0, evaluate=n % 2, idle=0.5) for n in range(1, 40)]
    measured = measure(rows, config(train={"max_staleness": int(overlapping)}))
    line = timelines(rows, overlapping=overlapping)[0]
    assert measured is not None
    assert (line.bottleneck, line.measured, line.steps) == (measured.bottleneck, measured.steps, 39)


def test_the_newest_stage_comes_first() -> None:
    rows = [step(1, "warm_start", step=1.0), step(1, step=1.0), {"stage": "search", "step": 1}]
    assert [line.stage for line in timelines(rows, overlapping=False)] == ["online", "warm_start"]
