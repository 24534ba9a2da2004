"""The counters of a run state: names, order and number types of its JSON."""

from __future__ import annotations

import json

from rlsys.control.counters import Counters


def test_a_run_state_keeps_counters_as_floats_in_a_fixed_order() -> None:
    counters = Counters(failed_rollouts=1, verifications=4, skipped_steps=2)
    assert json.dumps(counters.as_floats()) == (
        '{"failed_rollouts": 1.0, "failed_verifications": 0.0, "verifications": 4.0, "filtered_groups": 0.0, '
        '"filtered_tokens": 0.0, "unlogged_tokens": 0.0, "skipped_steps": 2.0}'
    )
    assert Counters.of(counters.as_floats()) == counters


def test_missing_counters_are_zero() -> None:
    assert Counters.of({"skipped_steps": 3.0}) == Counters(skipped_steps=3)
    assert Counters.of({}) == Counters()
