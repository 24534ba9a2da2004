"""What the script for folders of input cases calls a problem."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


def case(folder: Path, command: str, config: str = "run: {}\n") -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "README.md").write_text(f"Command: `{command}`. Expected: a refusal. Got: nothing.\n")
    return folder


def test_a_refusal_by_check_is_no_problem(
    tmp_path: Path, input_cases: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert input_cases.problems(case(tmp_path / "a", "rlsys check config.yaml")) == []
    shown = capsys.readouterr().out
    assert "expected: a refusal." in shown and "check: exit code 2" in shown and "train" not in shown


@pytest.mark.parametrize(
    ("codes", "said", "problem"),
    [
        ((0, 2), "", "check accepts it and train refuses it"),
        ((0, 1), "", "train ended with exit code 1"),
        ((2, -1), "", "train ended with exit code -1"),
        ((2, 2), "Traceback (most recent call last)", "check ended with exit code 2"),
    ],
)
def test_what_is_a_problem(
    tmp_path: Path,
    input_cases: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    codes: tuple[int, int],
    said: str,
    problem: str,
) -> None:
    answers = iter(codes)
    calls = []

    def run(command: list[str], folder: Path) -> tuple[int, str, float]:
        calls.append(command[1:])
        return next(answers), said, 0.0

    monkeypatch.setattr(input_cases, "run", run)
    lines = input_cases.problems(case(tmp_path / "a", "rlsys train config.yaml sampling.temperature=3"))
    assert any(problem in line for line in lines)
    assert calls == [[name, "config.yaml", "sampling.temperature=3"] for name in ("check", "train")]
