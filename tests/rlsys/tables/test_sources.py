"""Variables in paths."""

from __future__ import annotations

import pytest

from rlsys.errors import ConfigError
from rlsys.tables.sources import expand


def test_variables_and_the_home_folder_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("DATA", "/data")
    assert expand("${DATA}/a/$DATA.jsonl", "task.path") == "/data/a//data.jsonl"
    assert expand("~/a", "task.path") == "/home/x/a"


def test_a_variable_that_is_not_set_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA", raising=False)
    with pytest.raises(ConfigError, match=r"^sft\.path \$\{DATA\}/a: the environment variable DATA is not set; set it"):
        expand("${DATA}/a", "sft.path")
