"""The settings of the distillation bottleneck are configs that rlsys accepts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from rlsys.config.files import load_config


def test_the_configs_of_all_arms_are_accepted(importable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # a benchmark replaces the first entry
    bottleneck = importlib.import_module("bottleneck")
    student = [*bottleneck.ROOM, "model={path: student}"]
    arms = bottleneck.arms_of(Path("teacher"), Path("rows.parquet"))
    for settings, last in arms.values():
        assert load_config(bottleneck.CONFIG, [*student, *settings]).stages[-1] == last
    for model in (bottleneck.TEACHER, bottleneck.STUDENT):
        load_config(bottleneck.CONFIG, ["stages=[warm_start]", *bottleneck.ROOM, *model])
    drawn = load_config(bottleneck.CONFIG, [*student, *bottleneck.DRAWN]).search
    assert (drawn.stop.simulations, sum(drawn.tables["chain"].children["start"].values())) == (4, 10)
