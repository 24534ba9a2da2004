"""Finished parts of an evaluation on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlsys.errors import ConfigError
from rlsys.evaluation import parts as parts_module
from rlsys.evaluation.parts import Parts, code_digest

ORIGIN = {"weights": "w", "seed": 1}


def test_a_part_is_read_only_for_the_same_origin(tmp_path: Path) -> None:
    parts = Parts.beside(str(tmp_path / "figures.json"))
    assert parts.read("a-greedy", ORIGIN) is None
    assert parts.write("a-greedy", ORIGIN, [(1, 0.1)]) == [[1, 0.1]]  # as it is read later
    assert Parts.beside(str(tmp_path / "figures.json")).read("a-greedy", ORIGIN) == [[1, 0.1]]
    for other in ({**ORIGIN, "seed": 2}, {**ORIGIN, "weights": "v"}, {**ORIGIN, "more": 0}):
        assert parts.read("a-greedy", other) is None
    assert [path.parent.name for path in tmp_path.rglob("a-greedy-*.json")] == ["figures.json.parts"]


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"origin": {"weights": "v"}, "content": 3}'])
def test_a_damaged_part_is_made_again(tmp_path: Path, damage: str) -> None:
    parts = Parts.beside(str(tmp_path / "figures.json"))
    parts.write("a", ORIGIN, 3)
    [path] = (tmp_path / "figures.json.parts").iterdir()
    path.write_text(damage)
    assert parts.read("a", ORIGIN) is None
    parts.write("a", ORIGIN, 4)
    assert json.loads(path.read_text())["content"] == 4


def test_without_an_output_file_nothing_is_kept() -> None:
    parts = Parts.beside(None)
    assert parts.write("a", ORIGIN, (1, 2)) == [1, 2] and parts.read("a", ORIGIN) is None


@pytest.mark.parametrize("output", ["missing/figures.json", "."])
def test_an_output_file_that_cannot_be_written_is_refused_early(tmp_path: Path, output: str) -> None:
    with pytest.raises(ConfigError, match="^--output .*: expected the name of a file, but it"):
        Parts.beside(str(tmp_path / output))


def test_the_code_is_part_of_the_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_digest() == code_digest() and {"sources", "torch"} <= code_digest().keys()
    for folder in ("rlsys", "actors"):
        (tmp_path / folder).mkdir()
    (tmp_path / "rlsys" / "__init__.py").write_text("")
    monkeypatch.setattr(parts_module.rlsys, "__file__", str(tmp_path / "rlsys" / "__init__.py"))
    monkeypatch.setattr(parts_module, "CODE", ("actors", "rlsys/__init__.py"))
    before = code_digest()["sources"]
    (tmp_path / "actors" / "new.py").write_text("x = 1")
    assert code_digest()["sources"] != before
