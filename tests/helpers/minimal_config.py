"""The smallest valid config, as nested dictionaries."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from rlsys.config.files import apply_override, parse_config
from rlsys.config.schema import Config

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "some/model"},
    "task": {"type": "letter_count"},
}


def minimal(**changes: Any) -> dict[str, Any]:
    """Return the smallest valid config with changes, given as `section__key=value`."""
    values = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return values


def minimal_with(overrides: Sequence[str]) -> Config:
    """Return the minimal config with overrides."""
    values = minimal()
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, "c.yaml")
