"""The page of metrics is made from the registry and names nothing else."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from rlsys.run.metrics import METRICS
from rlsys.run.metrics_page import ADVICE, page

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_metric_is_on_the_page_once() -> None:
    lines = page().splitlines()
    for spec in METRICS.values():
        assert sum(line.startswith(f"| `{spec.name}` | {spec.unit} |") for line in lines) == 1


def test_advice_names_metrics_that_exist() -> None:
    for pattern in (name for names in ADVICE for name in names):
        assert any(fnmatch(name, pattern) for name in METRICS), pattern
