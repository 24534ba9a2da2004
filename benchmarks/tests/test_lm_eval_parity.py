"""What `lm_eval_parity.py` writes for the harness, and how it compares."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rlsys.types import Message


@pytest.fixture
def parity(importable: None) -> ModuleType:
    return importlib.import_module("lm_eval_parity")


def sample(right: bool, reply: str = "") -> dict[str, Any]:
    return {"exact_match": float(right), "doc": {"question": "q", "answer": "1"}, "resps": [[reply]]}


def test_problems_that_differ_are_counted_even_if_the_accuracies_are_equal(parity: ModuleType) -> None:
    lines, different = parity.compare([True, False, True], [sample(False, "x"), sample(True), sample(True)])
    assert different == 2
    assert lines[2] == "| 3 | 0.6667 | 0.6667 | 2 |"
    assert "right by rlsys alone: 'q', '1': 'x'" in lines
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        parity.compare([True, True], [sample(True)])


def test_a_task_has_its_problems_in_a_local_file(parity: ModuleType, tmp_path: Path) -> None:
    parity.write_task(tmp_path / "task", [{"question": "q", "answer": "1"}], parity.ANSWER, 7)
    task = yaml.safe_load((tmp_path / "task" / "rlsys_held_out.yaml").read_text())
    path = Path(task["dataset_kwargs"]["data_files"]["test"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"question": "q", "answer": "1"}]
    assert task["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": 7}
    pattern = task["filter_list"][0]["filter"][0]["regex_pattern"]
    assert re.findall(pattern, "<answer>3</answer>...<answer> 2 </answer>") == ["3", "2"]


def test_a_system_message_is_split_off(parity: ModuleType) -> None:
    system, user = Message(role="system", content="s"), Message(role="user", content="u")
    assert parity.split("u") == ("", "u")
    assert parity.split((system, user)) == ("s", "u")
    with pytest.raises(SystemExit, match="one user turn"):
        parity.split((user, system, user))
