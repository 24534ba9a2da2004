"""The comparison of ways to choose one answer: its table by hand, and its cells."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tree_samples import answer, node, tree

from rlsys.config.search_values import AgreementValueConfig
from rlsys.trees import TreeFailure


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
    beams[8] = [[True, 250], [True, 600], [True, 250]]  # a third of the prompts does not fit into any budget
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


def test_a_beam_that_ends_too_late_is_wrong(decoding: ModuleType) -> None:
    rows = {decoding.SAMPLES: [drawn(("3", 0.0))] * 10, decoding.TREE: [drawn()] * 10}
    [row, *_] = decoding.table(rows, {2: [[True, 60]] * 9 + [[True, 70]]})[2:]
    assert row.split("|")[-2].split()[0] == "0.900"


def test_the_length_of_a_beam_ends_with_its_end_token(decoding: ModuleType) -> None:
    assert decoding.beam_length([5, 6, 2, 2, 2], 2) == 3  # finished beams are filled with end tokens
    assert decoding.beam_length([5, 6, 2, 0, 0], 2) == 3
    assert decoding.beam_length([5, 6, 7], 2) == 3


def test_the_answers_of_a_tree_have_one_vote_each_where_they_arrived(decoding: ModuleType) -> None:
    nodes = (
        node(0, "<thinking>a</thinking>"),
        answer(1, "<answer> 7 </answer>", "ok", samples=3, scored_tokens=60),
        answer(1, "<answer>3</answer>", "wrong", scored_tokens=40),
    )
    cells = decoding.ChoiceCells.__new__(decoding.ChoiceCells)
    row = cells.tree_row(None, tree(*nodes))
    found = [(each["text"], each["right"], each["tokens"], each["draws"]) for each in row["candidates"]]
    assert sorted(found) == [("3", False, 40, 1), ("7", True, 60, 1)] and row["total"] == found[-1][2]
    failure = TreeFailure(prompt_id="p", question="q", answer="a", reason="too long")
    assert cells.tree_row(None, failure) == {"candidates": [], "total": 0}


def test_no_beam_fits_a_budget(decoding: ModuleType) -> None:
    rows = {decoding.SAMPLES: [drawn(("3", 0.0))], decoding.TREE: [drawn()]}
    [row, *_] = decoding.table(rows, {1: [[True, 99]]})[2:]
    assert [cell.split()[0] for cell in row.strip("|").split("|")] == ["64", *["0.000"] * 5, "none"]


def test_the_tree_sees_no_verdict(decoding: ModuleType) -> None:
    for setup in decoding.TASKS.values():
        search = decoding.config_of(setup, Path("policy"), decoding.SEARCH).search
        assert isinstance(search.value, AgreementValueConfig)
        assert (search.backtracking, search.stop.correct, search.stop.tokens) == (False, (), 512)
