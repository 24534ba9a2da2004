"""Ratios are taken round by round, judged by their median, kept by name and compared."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def ratios() -> ModuleType:
    return importlib.import_module("ratios")


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("bench")


def ratio(ratios: ModuleType, **changes: Any) -> Any:
    values = {"name": "step", "against": "peer", "ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 4.0]}
    return ratios.Ratio(**{**values, "unit": "s", "limit": 2.0, **changes})


def test_a_cost_is_judged_by_how_much_cheaper_it_is(ratios: ModuleType) -> None:
    found = ratio(ratios)
    assert found.ratios == [3.0, 2.0, 1.0]
    assert found.median == 2.0 and found.met
    assert not ratio(ratios, limit=2.1).met


def test_a_rate_is_judged_by_its_share_of_the_peer(ratios: ModuleType) -> None:
    found = ratio(ratios, larger_is_better=True, limit=0.5)
    assert found.ratios == [1 / 3, 0.5, 1.0] and found.met
    assert not ratio(ratios, larger_is_better=True, limit=0.6).met


def test_an_upper_limit(ratios: ModuleType) -> None:
    assert ratio(ratios, at_most=True, limit=0.5).met
    assert not ratio(ratios, at_most=True, limit=0.4).met


def test_a_file_keeps_ratios_by_name_and_replaces_one_that_is_measured_again(
    ratios: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "bench.json"
    ratios.keep(file, [ratio(ratios), ratio(ratios, name="publish")])
    ratios.keep(file, [ratio(ratios, peer=[1.0, 2.0, 4.0])])
    assert [(found.name, found.median) for found in ratios.read(file)] == [("step", 1.0), ("publish", 2.0)]
    assert ratios.read(tmp_path / "missing.json") == []


def test_tables(ratios: ModuleType) -> None:
    text = ratios.table([ratio(ratios)])
    assert "| step | peer | 2 s | 4 s | 2.00 | 1.00 to 3.00 | at least 2 | met |" in text
    before, after = [ratio(ratios), ratio(ratios, name="gone")], [ratio(ratios, peer=[1.0, 2.0, 4.0])]
    compared = ratios.compared(before, after).splitlines()
    assert compared[2:] == ["| step | peer | 2.00 | 1.00 | 0.50 |", "| gone | | 2.00 | | |"]


def test_what_is_measured_is_not_measured_again(bench: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    output, started = tmp_path / "bench.json", []

    def run(command: list[Any], **_: Any) -> Any:
        started.append(Path(command[1]).name)
        if len(started) != 2:  # the second benchmark fails
            importlib.import_module("ratios").keep(
                output, [ratio(importlib.import_module("ratios"), name=str(len(started)))]
            )
        return SimpleNamespace(returncode=int(len(started) == 2))

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "BENCHMARKS", {"one": ["one.py"], "two": ["two.py"], "three": ["three.py"]})
    assert [bench.measured(name, output) for name in bench.left(output)] == [True, False, True]
    assert bench.left(output) == ["two"]
    assert bench.measured("two", output) and bench.left(output) == []
    assert started == ["one.py", "two.py", "three.py", "two.py"]


@pytest.mark.parametrize(("met", "code", "expected"), [(True, 0, True), (True, 1, False), (False, 1, True)])
def test_another_check_than_a_limit_fails_a_benchmark(
    bench: ModuleType, tmp_path: Path, monkeypatch: Any, met: bool, code: int, expected: bool
) -> None:
    output, ratios = tmp_path / "bench.json", importlib.import_module("ratios")

    def run(command: list[Any], **_: Any) -> Any:
        ratios.keep(output, [ratio(ratios) if met else ratio(ratios, peer=[1.0, 1.0, 1.0])])
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "BENCHMARKS", {"one": ["one.py"]})
    assert bench.measured("one", output) is expected


def test_an_unknown_benchmark_or_file_is_refused(
    bench: ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    for arguments, said in (
        (["stepp"], "unknown benchmark stepp"),
        (["--compare", str(tmp_path / "a"), str(tmp_path / "b")], "no such file"),
    ):
        monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            bench.main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
