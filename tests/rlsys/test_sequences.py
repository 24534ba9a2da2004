"""Common prefixes of token sequences."""

from __future__ import annotations

import numpy as np
import pytest

from rlsys.sequences import common_prefix_length


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3], [1, 9, 3], 1),  # equal tokens after the first difference do not count
        ([1, 2], [1, 2, 3], 2),
        ([1, 2], [1, 2], 2),
        ([5], [6], 0),
        ([], [6], 0),
    ],
)
def test_the_common_prefix_ends_at_the_first_difference(first, second, expected):
    sequences = np.array(first, dtype=np.int32), np.array(second, dtype=np.int32)
    assert common_prefix_length(*sequences) == expected
    assert common_prefix_length(*reversed(sequences)) == expected
