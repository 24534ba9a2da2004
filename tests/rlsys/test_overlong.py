"""Overlong reward shaping."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.overlong import soft_overlong_penalty

numbers = st.integers(-8, 8).map(lambda n: n / 4)


def test_soft_overlong_penalty_by_hand():
    # bound 100, buffer 20: nothing up to 80, half of the factor at 90, all of it at 100 and beyond
    lengths = np.array([0, 80, 81, 90, 100, 120])
    penalties = soft_overlong_penalty(lengths, max_tokens=100, buffer=20, factor=0.5)
    assert penalties == pytest.approx([0.0, 0.0, -1 / 40, -1 / 4, -1 / 2, -1 / 2], rel=1e-12)
    assert not np.signbit(penalties[:2]).any()
    assert soft_overlong_penalty(lengths, max_tokens=100, buffer=20, factor=0.0).tolist() == [0.0] * 6


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=8), buffer=st.integers(1, 50), factor=numbers.map(abs))
def test_soft_overlong_penalty_is_the_published_formula_up_to_the_bound(lengths, buffer, factor):
    penalties = soft_overlong_penalty(np.array(lengths, dtype=np.int64), max_tokens=50, buffer=buffer, factor=factor)
    published = [min(-(min(length, 50) - (50 - buffer)) / buffer * factor, 0.0) for length in lengths]
    assert penalties == pytest.approx(published, rel=1e-12, abs=1e-15)


def test_bad_bounds_of_the_penalty_are_refused():
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="overlong_buffer"):
            soft_overlong_penalty(np.array([1]), max_tokens=100, buffer=buffer, factor=1.0)
    with pytest.raises(ValueError, match="overlong_penalty"):
        soft_overlong_penalty(np.array([1]), max_tokens=100, buffer=10, factor=-1.0)
