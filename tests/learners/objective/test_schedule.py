"""Learning-rate courses against hand-made numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learners.objective.schedule import learning_rate
from rlsys.config.schema import OptimizerConfig


def course(total: int, **settings) -> list[float]:
    config = OptimizerConfig(learning_rate=0.8, **settings)
    return [learning_rate(config, update, total) for update in range(total)]


def test_warm_up_by_hand():
    # W = 3: 0.8 * 1/4, 2/4, 3/4, then the peak
    rates = course(6, warmup_updates=3, schedule="constant")
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rel=1e-12)


def test_linear_by_hand():
    # W = 1: 0.4, then p = 0, 1/4, 1/2, 3/4, 1 of the way from 0.8 to 0.8 * 0.25 = 0.2, 0.15 a step
    rates = course(6, warmup_updates=1, schedule="linear", final_fraction=0.25)
    assert rates == pytest.approx([0.4, 0.8, 0.65, 0.5, 0.35, 0.2], rel=1e-12)


def test_cosine_by_hand():
    # p = 0, 1/3, 2/3, 1: (1 + cos) / 2 = 1, 3/4, 1/4, 0; times 0.8 * (1 - 0.5), plus 0.4
    rates = course(4, warmup_updates=0, schedule="cosine", final_fraction=0.5)
    assert rates == pytest.approx([0.8, 0.7, 0.5, 0.4], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_stage_no_longer_than_its_warm_up_never_decays(schedule):
    assert course(2, warmup_updates=3, schedule=schedule) == pytest.approx([0.2, 0.4], rel=1e-12)
    assert course(4, warmup_updates=3, schedule=schedule)[-1] == 0.8


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_updates_past_the_end_keep_the_last_value(schedule):
    config = OptimizerConfig(learning_rate=0.8, warmup_updates=0, schedule=schedule, final_fraction=0.1)
    assert learning_rate(config, 50, 10) == learning_rate(config, 9, 10)


@given(
    total=st.integers(1, 60),
    warmup=st.integers(0, 70),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    final=st.floats(0, 1),
)
def test_rises_to_the_peak_then_never_rises(total, warmup, schedule, final):
    rates = course(total, warmup_updates=warmup, schedule=schedule, final_fraction=final)
    assert all(rate > 0 for rate in rates[:-1])
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(falling))
    if warmup < total - 1:
        last = 0.8 if schedule == "constant" else 0.8 * final
        assert math.isclose(rates[-1], last, rel_tol=1e-9, abs_tol=1e-15)


def test_bad_input_is_refused():
    for update, total in ((-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="expected update >= 0"):
            learning_rate(OptimizerConfig(), update, total)
