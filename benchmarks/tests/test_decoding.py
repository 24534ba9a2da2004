"""The comparison of ways to choose one answer: its table by hand, and its cells."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlsys.config.search_values import AgreementValueConfig


@pytest.fixture
def decoding(importable: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a benchmark replaces the first entry
    return importlib.import_module("decoding")


def drawn(*answers: tuple[str, float], draws: int = 1) -> dict[str, Any]:
    """Return candidates of 60 tokens each; the answer 7 is right."""
    found = [
        {"text": text, "right": text == "7", "tokens": 60 * number, "value": value, "draws": draws}
        for number, (text, value) in enumerate(answers, start=1)
    ]
    return {"candidates": found, "total": 60 * len(found)}


def test_the_table_by_hand(decoding: ModuleType) -> None:
    samples = [
        drawn(("3", -1.0), ("7", -0.5), ("7", -2.0), ("7", -3.0)),
        drawn(("7", -1.0), ("7", -2.0), ("3", -0.5)),
        drawn(*[("7", -1.0)] * 8),
    ]
    trees = [drawn(("3", 0.0), ("7", 0.0)), drawn(("7", 0.0)), drawn()]
    trees[0]["candidates"][1]["draws"] = 2
    beams = {1: [[True, 30], [False, 40], [False, 35]], 4: [[True, 200], [True, 240], [False, 220]]}
    lines = decoding.table({decoding.SAMPLES: samples, decoding.TREE: trees}, beams)
    means = {}
    for line in lines[2 : 2 + len(decoding.BUDGETS)]:
        budget, *cells = (cell.split()[0] for cell in line.strip("|").split("|"))
        means[int(budget)] = cells
    #                 first    majority  ended    best     tree     beams
    assert means[64] == ["0.667", "0.667", "0.667", "0.667", "0.333", "0.333"]
    assert means[128] == ["0.667", "0.667", "0.667", "1.000", "0.667", "0.333"]
    assert means[256] == ["0.667", "1.000", "1.000", "0.667", "0.667", "0.667"]
    assert lines[4].endswith("(4) |")
    # Four equal votes have the certainty 31 / 32, so the last 4 of the third prompt's 8 samples are not drawn.
    assert "uses 0.73 of them" in "\n".join(lines)  # 11 of 15 samples


def test_no_beam_fits_a_budget(decoding: ModuleType) -> None:
    rows = {decoding.SAMPLES: [drawn(("3", 0.0))], decoding.TREE: [drawn()]}
    [row, *_] = decoding.table(rows, {1: [[True, 99]]})[2:]
    assert [cell.split()[0] for cell in row.strip("|").split("|")] == ["64", *["0.000"] * 5, "none"]


def test_the_tree_sees_no_verdict(decoding: ModuleType) -> None:
    for setup in decoding.TASKS.values():
        search = decoding.config_of(setup, Path("policy"), decoding.SEARCH).search
        assert isinstance(search.value, AgreementValueConfig)
        assert (search.backtracking, search.stop.correct, search.stop.tokens) == (False, (), 512)
