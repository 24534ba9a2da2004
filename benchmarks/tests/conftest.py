"""The modules of the storm, which lie beside this folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    names = ("storm_plan", "storm_figures", "storm_processes", "storm")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def plan(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["storm_plan"]


@pytest.fixture
def figures(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["storm_figures"]


@pytest.fixture
def processes(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["storm_processes"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests import the benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))


@pytest.fixture
def soak(importable: None) -> ModuleType:
    return importlib.import_module("soak")


@pytest.fixture
def control_plane(importable: None) -> ModuleType:
    return importlib.import_module("control_plane")


@pytest.fixture
def input_cases(importable: None) -> ModuleType:
    return importlib.import_module("input_cases")


@pytest.fixture
def results_page(importable: None) -> ModuleType:
    return importlib.import_module("results_page")
