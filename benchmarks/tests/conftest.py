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


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    return importlib.import_module("soak")
