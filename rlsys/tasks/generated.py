"""Random numbers that are a function of what they are drawn for."""

from __future__ import annotations

import hashlib
import random


def hashed_random(*parts: object) -> random.Random:
    """A generator seeded by the sha256 of the parts: the same in every process and Python version."""
    text = ":".join(str(part) for part in parts)
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
