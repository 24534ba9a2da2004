"""Comparisons of token sequences."""

from __future__ import annotations

import numpy as np

from rlsys.types import Int32Array


def common_prefix_length(first: Int32Array, second: Int32Array) -> int:
    """Return the length of the longest common prefix of two token sequences, in tokens."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def order_key(sequence: Int32Array) -> bytes:
    """Return a key by which sequences sort in lexicographic order. No id is negative."""
    return sequence.astype(">i4").tobytes()
