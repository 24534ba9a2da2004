"""IFEval through the package if-verifiable."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.outside_tasks import BenchmarkConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tasks import build_task
from rlsys.tasks.instructions import instructions

# The columns of google/IFEval; each entry of kwargs has null for the arguments of other instructions.
ROW: dict[str, Any] = {
    "key": 1,
    "prompt": "Write about rain, without commas, in at least 3 words.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [
        {"relation": None, "num_words": None},
        {"relation": "at least", "num_words": 3},
    ],
}


def task_of(folder: Path, **changes: Any) -> Any:
    pytest.importorskip("if_verifiable")
    path = folder / "ifeval.jsonl"
    path.write_text(json.dumps(ROW | changes) + "\n")
    return build_task(BenchmarkConfig(name="ifeval", path=str(path)), 0)


@pytest.mark.parametrize(
    ("completion", "reward", "right", "answered", "detail"),
    [
        ("Rain falls down.", 1.0, True, True, ""),
        ("Rain, it falls.", 0.5, False, True, "not followed: punctuation:no_comma"),
        ("<think>Well, no.</think>Rain falls down.", 1.0, True, True, ""),
        ("Rain,", 0.0, False, True, "not followed: punctuation:no_comma, length_constraints:number_words"),
        ("  ", 0.0, False, False, "no answer: it is empty"),
    ],
)
def test_the_reward_is_the_share_of_instructions_that_are_followed(
    tmp_path: Path, completion: str, reward: float, right: bool, answered: bool, detail: str
) -> None:
    task = task_of(tmp_path)
    problem = task.problem("held_out", 0)
    assert (problem.question, problem.answer, task.notes()) == (ROW["prompt"], "", ())
    verdict = task.verify(problem, completion)
    assert (verdict.reward, verdict.correct, verdict.answered, verdict.detail) == (reward, right, answered, detail)
    assert not task.verify(problem, completion, finished=False).answered


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kwargs": [{}]}, r"row 1: expected instruction_id_list and kwargs with one entry for each instruction"),
        ({"kwargs": None}, r"row 1: expected instruction_id_list and kwargs"),
        ({"kwargs": [{}, 3]}, r"row 1: expected the arguments of an instruction by name"),
        ({"instruction_id_list": ["a:b", "c:d"]}, r"row 1: if-verifiable has no check for the instruction 'a:b'"),
    ],
)
def test_rows_that_cannot_be_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task_of(tmp_path, **changes).size("held_out")


def test_missing_data_of_nltk_is_named(tmp_path: Path) -> None:
    nltk = pytest.importorskip("nltk")
    sentences = {"relation": "at least", "num_sentences": 2}
    changes = {"instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [sentences]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(tmp_path)])
        with pytest.raises(ConfigError, match=r"need the data punkt_tab of nltk.*nltk\.downloader -d .* punkt_tab"):
            task_of(tmp_path, **changes).size("held_out")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instructions.cache_clear()
    original = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name.startswith(("if_verifiable", "langdetect")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"task\.name ifeval: expected the package if-verifiable.*pip install if-ver"):
        build_task(BenchmarkConfig(name="ifeval", path="x.jsonl"), 0)
