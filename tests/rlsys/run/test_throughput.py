"""Who waits for whom, and the balanced split, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from resumable_runs import config

from rlsys.run.throughput import WINDOW, Split, measure


def rows(count: int, **metrics: float) -> list[dict[str, Any]]:
    names = {name.replace("__", "/"): value for name, value in metrics.items()}
    return [{"stage": "online", "step": step, "weights/version": step, **names} for step in range(1, count + 1)]


def settings(staleness: int, actors: int = 2, ranks: int = 2, **sections: Any) -> Any:
    return config(train={"max_staleness": staleness}, actors={"count": actors}, learner={"ranks": ranks}, **sections)


SLOW_ACTORS = {
    "time__step_s": 10.0,
    "time__rollout_s": 6.0,
    "time__learn_s": 3.0,
    "time__publish_s": 1.0,
    "rollout__idle_policy": 0.0,
    "rollout__generated_tokens": 500.0,
    "learner__tokens": 400.0,
}


def test_rates_and_shares() -> None:
    measured = measure(rows(3, **SLOW_ACTORS), settings(1))
    assert measured is not None
    assert (measured.steps, measured.step_s, measured.actors_idle) == (3, 10, 0)
    assert (measured.generated_tokens_per_s, measured.trained_tokens_per_s) == (50, 40)
    assert measured.shares == pytest.approx(
        {"wait": 0.6, "learn": 0.3, "publish": 0.1, "checkpoint": 0, "evaluate": 0, "rest": 0}
    )
    assert measured.bottleneck.startswith("generation: the learner waits for trajectories 60%")


def test_more_actors_balance_slow_generation() -> None:
    """A = 2 * 10 engine-seconds, L = 2 * 3: of 4 processes, 3 and 1 take max(20/3, 6) + 1; 2 and 2 take 10 + 1."""
    measured = measure(rows(3, **SLOW_ACTORS), settings(1))
    assert measured is not None
    assert measured.present == Split(actors=2, ranks=2, step_s=11)
    assert measured.best == Split(actors=3, ranks=1, step_s=pytest.approx(20 / 3 + 1))


def test_processes_that_take_turns() -> None:
    """With max_staleness 0 the actors are busy 6 s: A = 12, L = 6; 12/2 + 6/2 + 1 = 10, 12/3 + 6/1 + 1 = 11."""
    measured = measure(rows(3, **{**SLOW_ACTORS, "rollout__idle_policy": 0.4}), settings(0))
    assert measured is not None
    assert measured.present == measured.best == Split(actors=2, ranks=2, step_s=pytest.approx(10))
    assert measured.bottleneck.endswith("they take turns, as train.max_staleness is 0")


def test_a_slow_learner_and_slow_publishes_are_named() -> None:
    idle = {**SLOW_ACTORS, "time__rollout_s": 0.1, "time__learn_s": 9.0, "rollout__idle_policy": 0.7}
    learner = measure(rows(2, **idle), settings(1))
    assert learner is not None and learner.bottleneck.startswith("learning: ")
    assert learner.best is not None and learner.best.ranks == 3
    publish = measure(rows(2, **{**idle, "time__learn_s": 1.0, "time__publish_s": 8.0}), settings(1))
    assert publish is not None and publish.bottleneck.startswith("publishes take 80%")


def test_only_the_last_steps_of_a_stage_count() -> None:
    slow, fast = rows(5, **{**SLOW_ACTORS, "time__step_s": 100.0}), rows(WINDOW, **SLOW_ACTORS)
    measured = measure([*slow, *fast], settings(1))
    assert measured is not None and measured.steps == WINDOW and measured.step_s == 10


def test_steps_without_actors_have_no_split() -> None:
    measured = measure(rows(2, time__step_s=1.0, time__learn_s=0.9, learner__tokens=50.0), settings(0))
    assert measured is not None
    assert (measured.present, measured.best, measured.generated_tokens_per_s) == (None, None, None)
    assert measured.trained_tokens_per_s == 50
    assert "no actor takes part" in measured.bottleneck
    alone = measure(rows(2, **SLOW_ACTORS), settings(0, actors=1, ranks=1))
    assert alone is not None and alone.present is None, "there is no other split of two processes"
    assert measure([], settings(0)) is None
