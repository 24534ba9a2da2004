"""What the script for folders of input cases calls a problem."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


def case(folder: Path, command: str, expected: str = "a refusal.", config: str = "run: {}\n") -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "README.md").write_text(f"Command: `{command}`. Expected: {expected} Got: nothing.\n")
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


@pytest.mark.parametrize(
    ("expected", "codes"),
    [
        ("refusal by check.", [2]),
        ("one line naming model.path, exit 2.", [2]),
        ("trains.", [0]),
        ("refusal before the start, or trains.", [0, 2]),
        ("reads it, or says that CSV is not read.", [0, 2]),
        ("something good.", []),
    ],
)
def test_the_words_of_an_expectation_allow_exit_codes(expected: str, codes: list[int], input_cases: ModuleType) -> None:
    assert input_cases.allowed_codes(expected) == codes


@pytest.mark.parametrize(
    ("expected", "code", "problem"),
    [
        ("refusal by check.", 0, "expected to be refused, but check ended with exit code 0"),
        ("trains.", 2, "expected to be accepted, but check ended with exit code 2"),
        ("something good.", 0, "README.md does not say whether it is refused or accepted"),
        ("refusal by check.", 2, None),
        ("trains.", 0, None),
        ("refusal before the start, or trains.", 0, None),
    ],
)
def test_an_outcome_that_was_not_expected_is_a_problem(
    tmp_path: Path,
    input_cases: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    expected: str,
    code: int,
    problem: str | None,
) -> None:
    monkeypatch.setattr(input_cases, "run", lambda command, folder: (code, "", 0.0))
    folder = case(tmp_path / "a", "rlsys check config.yaml", expected)
    for command in ("check", "train"):
        folder.joinpath("README.md").write_text(f"Command: `rlsys {command} config.yaml`. Expected: {expected} Got: x.")
        lines = input_cases.problems(folder)
        assert lines[:1] == ([f"a: {problem}"] if problem else [])
