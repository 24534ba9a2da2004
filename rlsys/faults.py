"""Named fault points, off unless the environment variable RLSYS_FAULTS names them.

`RLSYS_FAULTS="publish.omit=lm_head.weight;other.point=value"`. Tests use them to show that a promise holds.
"""

from __future__ import annotations

import os


def fault(point: str) -> str | None:
    """The value given for a fault point, or None where it is not active."""
    for entry in os.environ.get("RLSYS_FAULTS", "").split(";"):
        name, _, value = entry.partition("=")
        if name.strip() == point:
            return value.strip()
    return None
