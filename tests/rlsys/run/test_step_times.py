"""Parts of the time of a step, idle shares and the sentence about them, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rlsys.run.metrics import METRICS
from rlsys.run.step_times import PARTS, ROLES, bottleneck, idle_shares, part_seconds, part_shares


def step(**values: float) -> dict[str, Any]:
    idle = {"rollout/idle_policy": values.pop("idle")} if "idle" in values else {}
    return {"stage": "online", "step": 1, **{f"time/{name}_s": value for name, value in values.items()}, **idle}


def test_metrics_are_in_the_registry() -> None:
    assert {name for name, _ in PARTS.values() if name} | set(ROLES) <= set(METRICS)


def test_parts_add_up_to_the_steps_and_longer_steps_weigh_more() -> None:
    rows = [step(step=10.0, rollout=4.0, learn=3.0, publish=1.0, evaluate=1.5), step(step=30.0, learn=30.0)]
    assert part_seconds(rows[0]) == {
        "wait": 4.0, "learn": 3.0, "publish": 1.0, "evaluate": 1.5, "checkpoint": 0.0, "rest": 0.5,
    }  # fmt: skip
    assert part_shares(rows)["learn"] == 33 / 40


def test_idle_shares_leave_evaluations_out() -> None:
    rows = [step(step=11.0, evaluate=1.0, idle=0.2), step(step=30.0, idle=0.6), step(step=5.0)]
    assert idle_shares(rows) == {"actors": (0.2 * 10 + 0.6 * 30) / 40}


@pytest.mark.parametrize(
    ("values", "overlapping", "words"),
    [
        ({"step": 10.0, "rollout": 8.0, "learn": 2.0, "idle": 0.1}, True, ("generation: ", "more actors or shorter")),
        ({"step": 10.0, "rollout": 1.0, "learn": 9.0, "idle": 0.8}, True, ("learning: ", "more learner ranks")),
        ({"step": 10.0, "rollout": 0.1, "learn": 9.9, "idle": 0.01}, True, ("none: ", "idle 1%")),
        ({"step": 10.0, "rollout": 5.0, "learn": 4.0, "idle": 0.5}, False, ("generation: ", "they take turns")),
        ({"step": 10.0, "rollout": 4.0, "learn": 5.0, "idle": 0.5}, False, ("learning: ", "they take turns")),
        ({"step": 10.0, "evaluate": 8.0, "learn": 2.0, "idle": 0.5}, True, ("evaluations take 80%", "more than")),
        ({"step": 10.0, "learn": 9.0}, False, ("the learner works 90%", "no actor takes part")),
    ],
)
def test_the_sentence_names_the_slower_side(
    values: dict[str, float], overlapping: bool, words: tuple[str, str]
) -> None:
    sentence = bottleneck([step(**values)], overlapping=overlapping)
    assert sentence.startswith(words[0]) and words[1] in sentence
