"""The benchmarks refuse what would make their figures wrong."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("a run was started"))
    return module


def test_a_run_that_was_cut_short_is_not_timed_from_its_resume(quickstart: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "online"}\n')
    with pytest.raises(SystemExit, match="cut short"):
        quickstart.run(0, tmp_path)
    (tmp_path / "wall-seconds").write_text("12.0\n")
    assert quickstart.run(0, tmp_path) == [{"stage": "online"}]


def test_the_folder_of_the_picture_is_made(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "PICTURE", tmp_path / "docs" / "picture.png")
    row = {"stage": "online", "step": 1, "rollout/reward": 0.5, "held_out/sampled_accuracy": 0.5}
    quickstart.plot({0: [row]})
    assert quickstart.PICTURE.stat().st_size > 0
