"""Convert a run state to JSON and back."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from rlsys.errors import CheckpointError
from rlsys.types import RunState


def state_to_json(state: RunState) -> dict[str, Any]:
    """Return a run state as JSON-able values, which `state_from_json` reads back to an equal state."""
    return {**asdict(state), "in_flight": list(state.in_flight), "counters": dict(state.counters)}


def state_from_json(value: Any) -> RunState:
    """Return the run state in a JSON value.

    Raises:
        CheckpointError: a key is missing, unknown or of the wrong type.
    """
    names = {field.name for field in fields(RunState)}
    if not isinstance(value, dict) or set(value) != names:
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"run state: expected the keys {sorted(names)}, found {keys}")
    in_flight, counters = value["in_flight"], value["counters"]
    integers = [value[name] for name in ("stage", "step", "weight_version", "cursor")]
    if not isinstance(in_flight, list) or not all(_is_count(item) for item in [*integers, *in_flight]):
        raise CheckpointError(f"run state: expected integers from 0 on, found {integers}, in_flight {in_flight!r}")
    if not isinstance(counters, dict) or not all(type(item) in (int, float) for item in counters.values()):
        raise CheckpointError(f"run state: expected counters to be numbers by name, found {counters!r}")
    return RunState(**{**value, "in_flight": tuple(in_flight)})


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
