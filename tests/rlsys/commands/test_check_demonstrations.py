"""What `rlsys check` says of demonstrations that do not fit their settings or their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlsys.commands import check
from rlsys.commands.check_demonstrations import COUNT, demonstrations, turn_with_stop
from rlsys.config.environment import active_environment
from rlsys.config.files import parse_config
from rlsys.config.risks import WARNING
from rlsys.tasks import build_task

TOOL = """
from rlsys.environments import Reply

def price(problem, turns):
    return Reply(text=f"<price>{turns[-1]}</price>") if turns else Reply()
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set: half of its demonstrations ask, a quarter is wrong, and one is long."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(TOOL)
    texts = ["<ask>fig</ask>", "<answer>7</answer>", "<ask>plum</ask>", "<answer>8</answer>"]
    rows = [{"question": f"q{n}", "answer": "7", "shown": texts[n % 4]} for n in range(400)]
    rows[1]["shown"] = f"{'long ' * 40}<answer>7</answer>"
    (tmp_path / "shop.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def lines_of(capsys: pytest.CaptureFixture[str], *, stop: str | None, **changes: Any) -> list[str]:
    environment = {"environment": {"fn": "shop.py:price", "stop": [stop]}} if stop else {}
    values: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"from_scratch": {"hidden_size": 32, "layers": 1, "heads": 1}},
        "task": {"type": "dataset", "path": "shop.jsonl", "demonstration_column": "shown"},
        "train": {"max_steps": 1, "groups_per_step": 4, "group_size": 2, "updates_per_step": 1},
        "actors": {"count": 1, "max_model_len": 512},
        "sampling": {"max_tokens": 64},
        "learner": {"ranks": 1},
    }
    check.run(parse_config({**values, **environment, **changes}, "c.yaml"))
    return capsys.readouterr().out.splitlines()


def test_a_misspelt_stop_string_is_warned_of(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, stop="</aks>")
    assert any(line.startswith(f"{WARNING}environment.stop: '</aks>' ends no turn of ") for line in lines)
    assert any(line.startswith("no demonstration has a turn that ends with '</aks>'") for line in lines)
    assert lines[-1].startswith("ok, ")


def test_the_tool_is_tried_with_a_turn_of_a_demonstration(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, stop="</ask>")
    assert not any("ends no turn" in line or "made up" in line for line in lines)
    [reply] = [line for line in lines if line.startswith("reply of the environment")]
    assert "'<ask>fig</ask>'" in reply and "'<price><ask>fig</ask></price>'" in reply


def test_long_and_wrong_demonstrations_are_warned_of(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, stop="</ask>")
    assert any("1 of 256 demonstrations are longer than sampling.max_tokens (64)" in line for line in lines)
    [judged] = [line for line in lines if "the verifier judges" in line]
    assert "without an answer" not in judged, "a call of the tool has no answer yet"
    [judged] = [line for line in lines_of(capsys, stop=None) if "the verifier judges" in line]
    assert " wrong and " in judged and " without an answer: " in judged


def test_generated_demonstrations_may_be_wrong(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, stop=None, task={"type": "letter_count", "error_rate": 0.9}, sampling={"max_tokens": 200})
    assert not any("demonstrations" in line for line in lines if line.startswith(WARNING))


def test_demonstrations_are_taken_evenly(shop: Path) -> None:
    task = {"type": "dataset", "path": "shop.jsonl", "demonstration_column": "shown"}
    config = parse_config(
        {
            "run": {"dir": "x"},
            "model": {"from_scratch": {}},
            "task": task,
            "environment": {"fn": "shop.py:price", "stop": ["</ask>"]},
        },
        "c.yaml",
    )
    shown = demonstrations(build_task(config.task, 0), 0)
    assert len(shown) == len({problem.problem_id for problem, _ in shown}) == COUNT
    assert max(int(str(problem.question).removeprefix("q")) for problem, _ in shown) > 390
    environment = active_environment(config.environment, config.task)
    assert environment is not None
    problem, turn = turn_with_stop(environment, [(shown[0][0], "x</ask> y")])
    assert (problem, turn) == (shown[0][0], "x</ask>")
