"""The adaptive share of a teacher."""

from __future__ import annotations

import json
import math

import pytest

from rlsys.interpolation import TeacherShare

LINE = {"last": 1.0, "rate": 5e-4}


def test_the_share_of_two_steps_by_hand() -> None:
    first = TeacherShare(share=0.4).after(2.0, linear=0.41, **LINE)
    assert first == TeacherShare(share=0.41, loss=2.0)  # nothing to compare the first loss with
    # The loss falls from 2 to 1.5: m = 0.01 * 0.25, and the line is behind.
    second = first.after(1.5, linear=0.41, **LINE)
    assert second.momentum == pytest.approx(0.0025, abs=1e-15)
    assert second.share == pytest.approx(0.41 + 5e-4 * 0.59 / (1 + math.exp(-0.0025)), abs=1e-15)
    # It rises to 3: m = 0.99 * 0.0025 - 0.01.
    third = second.after(3.0, linear=0.0, **LINE)
    assert third.momentum == pytest.approx(-0.007525, abs=1e-15)
    assert third.share > second.share


def test_the_line_is_a_floor_and_the_last_share_a_ceiling() -> None:
    share = TeacherShare(share=0.5, momentum=0.0, loss=1.0)
    assert share.after(1.0, linear=0.8, last=1.0, rate=5e-4).share == 0.8
    assert share.after(1.0, linear=0.5, last=0.6, rate=1.0).share == 0.6  # 0.5 + 1 * 0.5 * 0.5 is above
    assert share.after(0.0, linear=0.5, **LINE).after(0.0, linear=0.5, **LINE).momentum < 0.01  # no division by 0


def test_a_stored_share_continues_with_the_same_bits() -> None:
    share = TeacherShare(share=0.4)
    for step in range(7):
        share = share.after(1 / (step + 3), linear=0.4 + 0.001 * step, **LINE)
        assert TeacherShare.of(json.loads(json.dumps({"others": 1.0, **share.as_floats()})), 0.4) == share
    assert TeacherShare.of({"others": 1.0}, 0.4) == TeacherShare(share=0.4)
