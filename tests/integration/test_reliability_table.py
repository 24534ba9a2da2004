"""The table that the tests of faults write of themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import reliability
from reliability import BEGIN, END, VARIABLE, Row, lost_and_twice, record, recorded, table, with_table

ROW = Row(
    fault="driver killed",
    promise="the same command continues",
    injection="kill9 | kill_driver",
    runs=30,
    passed=29,
    detection_s=1.26,
    recovery_s=20.0,
    steps_lost=2,
    prompts_lost=0,
    trained_twice=0,
)


def test_a_row_as_markdown() -> None:
    lines = table({"b": ROW, "a": Row(fault="a", promise="p", injection="i", runs=1, passed=1)}).splitlines()
    assert lines[0].startswith("| fault | promise | injected by | passed | detected, s | recovered, s | steps lost |")
    assert lines[1] == "|---|---|---|---|---|---|---|---|---|---|"
    assert lines[2] == "| a | p | i | 1 of 1 |  |  |  |  |  |  |"
    assert lines[3] == (
        "| driver killed | the same command continues | kill9 \\| kill_driver | 29 of 30 | 1.3 | 20.0 | 2 | 0 | 0 |  |"
    )
    assert len(lines) == 4


def test_a_test_that_fails_leaves_a_row_of_which_nothing_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(reliability, "DOCS", tmp_path)
    values = {"fault": "driver killed", "promise": "p", "injection": "i"}

    def passed() -> list[int]:
        return [row["passed"] for row in json.loads((tmp_path / "reliability.json").read_text()).values()]

    with recorded(**values, runs=3):
        assert passed() == [0]
    assert passed() == [3]
    with pytest.raises(KeyError), recorded(**values):
        raise KeyError
    assert passed() == [0]


def test_every_row_of_the_page_is_one_that_a_test_writes() -> None:
    """A fault that is called otherwise now would keep its old row for ever."""
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    kept = json.loads((reliability.DOCS / "reliability.json").read_text())
    patterns = ("control: resumed ", "a verifier that ")
    for fault in kept:
        name = next((fault.removeprefix(each) for each in patterns if fault.startswith(each)), fault)
        assert f'"{name}"' in sources, fault


def test_rows_are_kept_by_fault_and_the_prose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, kept = tmp_path / "reliability.md", tmp_path / "reliability.json"
    monkeypatch.delenv("RLSYS_WRITE_FIGURES", raising=False)
    record(ROW, tmp_path)
    assert not page.exists() and not kept.exists()

    monkeypatch.setenv("RLSYS_WRITE_FIGURES", "1")
    page.write_text(f"# Reliability\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    record(ROW, tmp_path)
    record(replace(ROW, fault="actor killed"), tmp_path)
    record(replace(ROW, passed=30), tmp_path)
    found = json.loads(kept.read_text())
    assert list(found) == ["actor killed", "driver killed"]
    assert (found["actor killed"]["passed"], found["driver killed"]["passed"]) == (29, 30)
    text = page.read_text()
    rows = {name: Row(**values) for name, values in found.items()}
    assert text == f"# Reliability\n\nBefore.\n\n{BEGIN}\n\n{table(rows)}\n{END}\n\nAfter.\n"
    record(replace(ROW, passed=30), tmp_path)
    assert page.read_text() == text


def test_a_page_that_is_not_there_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_WRITE_FIGURES", "1")
    record(ROW, tmp_path)
    assert (tmp_path / "reliability.md").read_text().startswith(f"# Reliability\n\n{BEGIN}\n\n| fault |")


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_page_without_its_markers_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected one <!-- figures --> and then one <!-- end of figures -->"):
        with_table(text, "rows")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([[0, 1], [3, 4]], (0, 0)),  # 2 was filtered
        ([[0, 1], [4, 5]], (1, 0)),
        ([[0, 1], [1, 3]], (0, 1)),
        ([[0, 2], [3, 4]], (1, 1)),  # 2 was trained though it had been filtered
    ],
)
def test_prompts_are_counted_in_the_ledger(steps: list[list[int]], expected: tuple[int, int], tmp_path: Path) -> None:
    lines = [{"version": n, "trained": step, "filtered": [], "skipped": []} for n, step in enumerate(steps, start=1)]
    lines[0]["filtered"] = [2]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert lost_and_twice(tmp_path) == expected
