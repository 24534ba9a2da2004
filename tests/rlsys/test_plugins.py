"""Code of the user: its names, its faults at import, and the digests by which a change is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlsys.errors import ConfigError
from rlsys.plugins import check_sources, load_plugin, plugin_digests, raised_text


def test_a_script_that_ends_the_program_is_a_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(
        ConfigError, match="rewards.fn 'mine.py:f': cannot import mine.py: SystemExit: 0 \\(mine.py:2\\)"
    ):
        load_plugin("mine.py:f", str(tmp_path), "rewards.fn")


def test_an_exception_names_the_innermost_line_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import json\n\ndef outer():\n    return inner()\n\ndef inner():\n    return json.loads('{')\n"
    )
    function = load_plugin("mine.py:outer", str(tmp_path), "rewards.fn")
    with pytest.raises(ValueError, match="Expecting property name") as caught:
        function()
    text = raised_text(caught.value)
    assert text.startswith("JSONDecodeError: Expecting property name") and text.endswith(" (mine.py:7)")
    assert raised_text(ValueError("x" * 1000)) == f"ValueError: {'x' * 400}"


def test_a_name_that_is_missing_lists_what_the_file_itself_defines(tmp_path: Path) -> None:
    text = "import os\nfrom json import loads\nLIMIT = 3\ndef _hidden(): pass\n"
    (tmp_path / "none.py").write_text(text)
    (tmp_path / "some.py").write_text(text + "class Game: pass\ndef reward(): pass\n")
    for name, listed in (("some", "Game, reward"), ("none", "no function or class of its own")):
        with pytest.raises(ConfigError, match=rf"{name}\.py has no 'nothere'; it has {listed}$"):
            load_plugin(f"{name}.py:nothere", str(tmp_path), "rewards.fn")


def test_every_named_file_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "own_module_b.py").write_text("x = 1")
    values: dict[str, Any] = {
        "rewards": {"functions": [{"fn": "a.py:f"}, {"fn": "format"}]},
        "objective": {"policy": {"estimator": "own_module_b:g"}, "kl": {"estimator": "k3"}},
        "environment": {"fn": None},
    }
    before = plugin_digests(values, str(tmp_path))
    assert set(before) == {"plug-in a.py", "plug-in own_module_b"}
    assert len(set(before.values())) == 1 and "" not in before.values()
    (tmp_path / "own_module_b.py").write_text("x = 2")
    after = plugin_digests(values, str(tmp_path))
    assert after["plug-in a.py"] == before["plug-in a.py"]
    assert after["plug-in own_module_b"] != before["plug-in own_module_b"]


def test_a_file_that_is_not_there_has_no_digest(tmp_path: Path) -> None:
    assert plugin_digests({"fn": "none.py:f"}, str(tmp_path)) == {"plug-in none.py": ""}


def test_a_file_or_module_that_is_not_there_is_refused_without_an_import(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("raise ValueError")
    functions = [{"fn": "format"}, {"fn": "raises.py:f"}, {"fn": "raises:f"}, {"fn": "json:loads"}, {"fn": ".x:f"}]
    check_sources({"rewards": {"functions": functions}, "objective": {"estimator": "k3"}}, str(tmp_path))
    for name, fault in (("none.py:f", f"no such file {tmp_path}/none.py"), ("own_module_c.inner:f", "no such module")):
        with pytest.raises(ConfigError, match=f"^rewards.functions.5.fn '{name}': cannot import .*{fault}"):
            check_sources({"rewards": {"functions": [*functions, {"fn": name}]}}, str(tmp_path))
