"""One file with the pages of a run, which opens without a server and loads nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rlsys.viewer import pages
from rlsys.viewer.app import STATIC
from rlsys.viewer.run_files import RunFiles

TOKENS, TREES, NODES = 40_000, 10, 5000
"""Largest numbers of tokens of all completions in the file, of trees, and of the nodes of all these trees."""


def page(runs: Sequence[RunFiles]) -> str:
    """Return the file: all curves and times, the rollouts of the newest weight version, and the first trees.

    The rollouts, times and trees are those of the first run. A search without training has its trees alone.
    """
    run = runs[0]
    version, rows = run.rollouts()
    run.trees.refresh()
    values: dict[str, Any] = {
        "title": "Copy",
        "runs": runs,
        "chosen": 0,
        "switches": False,
        "token": "",
        **pages.overview(runs),
        **pages.times(run),
        "points": {**pages.points(runs), "live": False},
        "version": version,
        "rollouts": pages.rollout_groups(_within(rows)),
        **pages.colouring(rows),
        "cut_off_rollouts": [] if rows else run.cut_off_rollouts(),
        "views": _trees(run),
        "total": len(run.trees.places),
        "cut_off": run.trees.cut_off,
        "style": _text("uplot.css") + _text("style.css"),
        "script": _text("uplot.js") + _text("curves.js"),
    }
    shown = ("groups", "lines", "rollouts", "cut_off_rollouts")
    values["trained"] = not values["views"] or any(values[name] for name in shown)
    return pages.environment().get_template("export.html").render(values)


def _within(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the first rows that have at most TOKENS tokens together, but at least one."""
    ends = itertools.accumulate(len(row["token_ids"]) for row in rows)
    return [row for number, (row, end) in enumerate(zip(rows, ends, strict=True)) if number == 0 or end <= TOKENS]


def _trees(run: RunFiles) -> list[pages.Values]:
    views: list[pages.Values] = []
    nodes = 0
    for number in range(min(TREES, len(run.trees.places))):
        view = pages.tree(run, number, 0)["view"]
        if view["failed"]:
            continue
        nodes += len(view["tree"].nodes)
        if views and nodes > NODES:
            break
        views.append(view)
    return views


def _text(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")
