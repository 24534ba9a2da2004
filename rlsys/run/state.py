"""Convert a run state to JSON and back."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rlsys.errors import DamagedFileError
from rlsys.files import read_json
from rlsys.types import RunState

_REMEDY = "resume from another checkpoint, or start a new run.dir"


def state_to_json(state: RunState) -> dict[str, Any]:
    """Return a run state as JSON-able values, which `state_from_json` reads back to an equal state."""
    return {**asdict(state), "in_flight": list(state.in_flight), "counters": dict(state.counters)}


def read_state(path: Path) -> RunState:
    """Return the run state in a file.

    Raises:
        DamagedFileError: the file cannot be read, or a key is missing, unknown or of the wrong type.
    """
    return state_from_json(read_json(path), path)


def state_from_json(value: Any, path: Path) -> RunState:
    """Return the run state in a JSON value.

    Args:
        path: the file of the value, for messages.

    Raises:
        DamagedFileError: a key is missing, unknown or of the wrong type.
    """
    names = {field.name for field in fields(RunState)}
    if not isinstance(value, dict) or set(value) != names:
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DamagedFileError(f"{path}: expected the keys {sorted(names)}, found {keys}; {_REMEDY}")
    in_flight, counters = value["in_flight"], value["counters"]
    integers = [value[name] for name in ("stage", "step", "weight_version", "cursor")]
    if not isinstance(in_flight, list) or not all(_is_count(item) for item in [*integers, *in_flight]):
        raise DamagedFileError(
            f"{path}: expected integers from 0 on, found {integers}, in_flight {in_flight!r}; {_REMEDY}"
        )
    if not isinstance(counters, dict) or not all(type(item) in (int, float) for item in counters.values()):
        raise DamagedFileError(f"{path}: expected counters to be numbers by name, found {counters!r}; {_REMEDY}")
    return RunState(**{**value, "in_flight": tuple(in_flight)})


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
