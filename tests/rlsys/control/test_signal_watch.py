"""The warning about rewards that teach nothing: its causes, once each, and only after several steps."""

from __future__ import annotations

import re

import pytest

from rlsys.control.signal_watch import STEPS, SignalWatch

FINE = {
    "rollout/zero_advantage_groups": 0.5,
    "rollout/truncated_rate": 0.0,
    "rollout/no_answer_rate": 0.1,
    "rollout/accuracy": 0.4,
    "rollout/reward": 0.4,
}


def watch(*steps: dict[str, float]) -> list[str]:
    said: list[str] = []
    watching = SignalWatch(say=said.append, max_tokens=160)
    for step in steps:
        watching.add(step)
    return said


def bad(**metrics: float) -> dict[str, float]:
    return {
        **FINE,
        "rollout/zero_advantage_groups": 1.0,
        **{f"rollout/{name}": value for name, value in metrics.items()},
    }


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (bad(truncated_rate=1.0, no_answer_rate=1.0, accuracy=0.0), r"cut off: raise sampling.max_tokens \(160\)"),
        (bad(no_answer_rate=1.0, accuracy=0.0), "no completion has an answer"),
        (bad(accuracy=1.0), "all answers are right"),
        (bad(accuracy=0.0), "no answer is right"),
        (bad(), "raise sampling.temperature, train.group_size"),
    ],
)
def test_a_lasting_cause_is_named_once_with_its_key(step: dict[str, float], cause: str) -> None:
    assert watch(*[step] * (STEPS - 1)) == []
    said = watch(*[step] * (3 * STEPS))
    assert len(said) == 1 and "\n" not in said[0]
    assert re.search(cause, said[0])


def test_a_step_with_a_signal_starts_the_count_anew() -> None:
    assert watch(*[bad()] * (STEPS - 1), FINE, *[bad()] * (STEPS - 1)) == []
    differing = {**FINE, "rollout/truncated_rate": 1.0, "rollout/no_answer_rate": 1.0}
    assert watch(*[differing] * STEPS) == [], "a penalty on length teaches something"
    assert watch(*[{"search/trees": 4.0}] * STEPS) == [], "searched groups alone say nothing about samples"


def test_another_cause_is_named_too() -> None:
    assert len(watch(*[bad(accuracy=0.0)] * STEPS, *[bad(accuracy=1.0)] * STEPS)) == 2


def test_episodes_of_one_turn_are_named_once_and_only_in_the_first_step() -> None:
    for turns, expected in (([1.0, 1.0], 1), ([1.01, 1.0], 0)):
        said: list[str] = []
        watching = SignalWatch(say=said.append, max_tokens=160, stops=("</ask>", "</tool>"))
        for each in turns:
            watching.add({**FINE, "rollout/turns": each})
        assert len(said) == expected
        assert all("no turn ended with '</ask>' or '</tool>' (environment.stop)" in line for line in said)


def test_episodes_without_stop_strings_may_have_one_turn() -> None:
    assert watch({**FINE, "rollout/turns": 1.0}) == []
