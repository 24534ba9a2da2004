"""Paired differences of two models."""

from __future__ import annotations

import pytest
from evaluations import ANSWERS, result

from rlsys.errors import ConfigError
from rlsys.evaluation.comparison import compare

BETTER = {"p0": (7, 7, 7, 3), "p1": (7, 3, 7, 3), "p2": (0, 0, 0, 7)}


def test_differences_by_hand() -> None:
    comparison = compare(result("a"), result("b", answers=BETTER))
    assert (comparison["first"], comparison["second"], comparison["task"]) == ("a", "b", "numbers")
    differences = comparison["differences"]
    assert differences["greedy"]["accuracy"]["mean"] == pytest.approx(1 / 3)  # 2 of 3, not 1
    assert differences["sampled"]["accuracy"]["mean"] == pytest.approx((6 - 3) / 12)
    assert differences["sampled"]["reward"]["mean"] == pytest.approx((6 - 3) / 12)
    assert differences["sampled"]["no_answer_rate"]["mean"] == pytest.approx((3 - 5) / 12)
    assert differences["pass_at_k"]["4"]["mean"] == pytest.approx(1 / 3)
    # The vote of p0 is now 7; p1 has two of each, of which 7 came first; the only answer of p2 is 7.
    assert differences["majority_at_k"]["4"]["mean"] == 1
    assert differences["sampled"]["completion_length"]["mean"] == 0


def test_a_difference_is_paired() -> None:
    """The second model is right once more on every problem: no problem differs from the others in the difference."""
    first = {f"p{n}": (7,) * (n % 4) + (3,) * (4 - n % 4) for n in range(20)}
    second = {f"p{n}": (7,) * (n % 4 + 1) + (3,) * (3 - n % 4) for n in range(20)}
    results = [result("a", answers=first), result("b", answers=second)]
    difference = compare(*results)["differences"]["sampled"]["accuracy"]
    assert difference["mean"] == pytest.approx(0.25)
    single = results[0]["sampled"]["accuracy"]
    assert difference["low"] > 0 > single["low"] - results[1]["sampled"]["accuracy"]["high"]


def test_lengths_of_different_tokenizers_do_not_compare() -> None:
    comparison = compare(result("a"), result("b", tokenizer="u"))
    assert not comparison["same_tokenizer"]
    assert "completion_length" not in comparison["differences"]["sampled"]
    assert "accuracy" in comparison["differences"]["sampled"]


def test_different_problems_are_refused() -> None:
    fewer = {name: ANSWERS[name] for name in ("p0", "p1")}
    with pytest.raises(ConfigError, match="^b: expected the problems of a, found others"):
        compare(result("a"), result("b", answers=fewer))
