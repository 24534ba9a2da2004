"""A run state survives JSON, and is read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.errors import DamagedFileError
from rlsys.run.state import state_from_json, state_to_json
from rlsys.types import RunState

PATH = Path("a/state.json")
counts = st.integers(0, 2**40)
states = st.builds(
    RunState,
    stage=counts,
    step=counts,
    weight_version=counts,
    cursor=counts,
    in_flight=st.lists(counts, max_size=5).map(tuple),
    counters=st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
)


@settings(max_examples=40, deadline=None)
@given(states)
def test_run_state_survives_json(state: RunState) -> None:
    assert state_from_json(json.loads(json.dumps(state_to_json(state))), PATH) == state


@pytest.mark.parametrize(
    "change",
    [
        {"step": None},
        {"step": True},
        {"step": -1},
        {"step": 1.0},
        {"extra": 1},
        {"in_flight": [1, "2"]},
        {"in_flight": 3},
        {"counters": {"failed": "many"}},
        {"counters": []},
    ],
)
def test_run_state_is_read_strictly(change: dict[str, object]) -> None:
    value = state_to_json(RunState(stage=0, step=1, weight_version=1, cursor=8, in_flight=(7,)))
    with pytest.raises(DamagedFileError, match="^a/state.json: expected .*; resume from another checkpoint"):
        state_from_json({**value, **change}, PATH)


@pytest.mark.parametrize("key", ["stage", "step", "weight_version", "cursor", "in_flight", "counters"])
def test_run_state_needs_every_key(key: str) -> None:
    value = state_to_json(RunState(stage=0, step=1, weight_version=1, cursor=8))
    del value[key]
    with pytest.raises(DamagedFileError, match=key):
        state_from_json(value, PATH)
