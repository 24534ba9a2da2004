"""The figure of an evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from evaluations import result

from rlsys.errors import ConfigError
from rlsys.evaluation.plot import check_plot, plot


def test_a_figure_for_two_models_and_tasks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure.png"
    check_plot(str(path))
    results = [result(name, task) for task in ("one", "two") for name in ("a", "b")]
    plot({"results": results}, str(path))
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 10_000
    plot({"results": results}, str(path))
    assert path.read_bytes() == first
    plot(result(), str(tmp_path / "one.svg"))
    svg = (tmp_path / "one.svg").read_text()
    assert svg.count("<svg") == 1 and "pass@k" in svg


def test_a_figure_without_samples(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    greedy = result()
    for name in ("sampled", "pass_at_k", "majority_at_k"):
        del greedy[name]
    plot(greedy, str(tmp_path / "greedy.svg"))
    assert "pass@k" not in (tmp_path / "greedy.svg").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [("figure.doc", "ends in .png"), ("figure", "ends in .png"), ("no/figure.png", "does not exist")],
)
def test_a_file_that_cannot_be_drawn_is_refused_early(tmp_path: Path, name: str, message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=message):
        check_plot(str(tmp_path / name))


def test_a_missing_matplotlib_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(
        ConfigError, match="^--plot needs matplotlib, which is not installed; run pip install matplotlib$"
    ):
        check_plot("figure.png")
