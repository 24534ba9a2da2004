"""The table of benchmarks/view.py: medians, verdicts, and what it says without a browser."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a benchmark replaces the first entry
    return importlib.import_module("view")


def test_the_median_of_the_last_measurement_is_judged(view: ModuleType) -> None:
    shown = (
        view.Page("list", "/trees", "tr", 2.0),
        view.Page("tree", "/tree/0", ".node", 0.5),
        view.Page("x", "/", "a"),
    )
    seconds = {
        "HTTP": [[1.0, 0.1, 9.0], [1.0, 0.1, 9.0], [1.0, 0.1, 9.0]],
        "Chromium": [[1.5, 0.6, 9.0], [9.0, 0.6, 9.0], [1.5, 0.1, 9.0]],
    }
    _, trees, tree, other = view.table(shown, seconds, [1000, 1000, 1000])
    assert trees.endswith("2 s kept") and "1.500 (9.000)" in trees
    assert tree.endswith("0.5 s MISSED") and "0.600 (0.600)" in tree
    assert other.endswith("9.000 (9.000)"), "a page without a bound has no verdict"


def test_without_a_browser_it_says_so(
    view: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with view.chromium_if_any() as browser:
        assert browser is None
    assert "only over HTTP: the package playwright is not installed" in capsys.readouterr().out


def test_copies_have_ids_of_their_own_and_the_largest_is_known(view: ModuleType, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "copies"
    source.mkdir()
    (source / "00000.jsonl").write_text('{"prompt_id":"a"}\n{"prompt_id":"b","more":1}\n')
    view.copy_trees(source, folder, 130)
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    assert lines[1] == '{"prompt_id":"train-1","more":1}' and lines[129] == '{"prompt_id":"train-129","more":1}'
    assert len(lines) == 130 and view.number_of_largest(source) == 1
