"""The tables of `rlsys evaluate`."""

from __future__ import annotations

import io
from typing import Any

import pytest
from evaluations import ANSWERS, result, rows_of, sample
from rich.console import Console

from rlsys.commands.evaluation_tables import show
from rlsys.evaluation.comparison import compare

NAMES = ("runs/quickstart/stages/warm_start", "runs/quickstart")


def shown(document: dict[str, Any]) -> list[str]:
    stream = io.StringIO()
    show(document, Console(file=stream, width=80))
    return stream.getvalue().splitlines()


def document(**changes: Any) -> dict[str, Any]:
    results = [result(name, **(changes if number else {})) for number, name in enumerate(NAMES)]
    return {"results": results, "comparisons": [compare(*results)]}


def test_one_model_has_a_table_of_values_and_intervals() -> None:
    lines = shown(result())
    assert lines[0] == "numbers: 3 problems, 4 samples each"
    assert lines[1].split() == ["figure", "value", "95", "%", "interval"]
    rows = {line[:29].strip(): line[29:].split() for line in lines[2:]}
    assert rows["sampled accuracy"][0] == "0.250"
    assert rows["pass@2"][0] == "0.444"
    assert rows["majority@2"][0] == "0.333"
    assert rows["sampled median length"] == ["2.000", "95", "%", "<=", "2"]


@pytest.mark.parametrize("name", ["value", "tokens"])
def test_two_models_fit_80_columns(name: str) -> None:
    long = [[sample("x", tokens=12345, right=each.right) for each in row] for row in rows_of(ANSWERS)]
    lines = shown(document(sampled=long) if name == "tokens" else document())
    assert lines[:2] == [f"A: {NAMES[0]}", f"B: {NAMES[1]}"]
    assert lines[3].split() == ["figure", "value", "95", "%", "interval", "difference", "to", "A"]
    assert max(map(len, lines)) <= 80
    accuracy = next(number for number, line in enumerate(lines) if line.startswith("sampled accuracy"))
    first, second = lines[accuracy].split(), lines[accuracy + 1].split()
    assert first[2:4] == ["A", "0.250"] and first[-1] == "0.500"
    assert second[:2] == ["B", "0.250"] and second[-4] == "+0.000"


def test_verifier_errors_and_checked_steps_have_rows_only_if_there_are_any() -> None:
    lines = shown(result())
    assert not any("verifier errors" in line or "every step" in line for line in lines)
    failed = result(greedy=[[sample(judged=False)]] + [[sample(right=True)]] * 2)
    failed["greedy"]["every_step_right"] = {"right": 1, "checked": 2}
    lines = shown(failed)
    assert [line.split() for line in lines if "verifier errors" in line] == [["greedy", "verifier", "errors", "0.333"]]
    assert [line.split()[-4:] for line in lines if "every step" in line] == [["0.500", "of", "2", "right"]]


def test_the_completions_of_a_detector_are_shortened() -> None:
    long = "I will not answer. " * 2 + "It is a matter of taste, and of the weather, and of the place and time of day."
    rows = [[sample(long, answered=False, reason="no final <answer>")]] * 3
    lines = shown(result(greedy=rows))
    place = lines.index("greedy ignored instruction: 3 of 3 completions")
    assert lines[place + 1].startswith("  p0#0: no final <answer> | ...")
    assert lines[place + 1].endswith("and of the place and time of day.")
    assert lines[place + 2].startswith("  p1#0: ") and len(lines[place + 1]) <= 80
    assert not lines[place + 3].startswith("  p2#0: ")


def test_the_accuracy_by_answer_is_shown_for_few_answers() -> None:
    assert "accuracy by true answer" in shown(result())
    assert "accuracy by true answer" not in shown(document())  # of one model alone


def test_rewards_have_a_row_only_if_they_are_not_the_accuracy() -> None:
    assert not any("reward" in line for line in shown(result()))
    lines = shown(result(greedy=[[sample(reward=0.25)], [sample(right=True)], [sample(right=True, reward=1.25)]]))
    assert [line.split()[:3] for line in lines if "reward" in line] == [["greedy", "reward", "0.833"]]


def test_episodes_out_of_turns_have_a_row_only_if_there_are_any() -> None:
    assert not any("out of turns" in line for line in shown(document()))
    lost = [[sample(out_of_turns=number == 0)] for number in range(3)]
    [line] = [line for line in shown(result(greedy=lost)) if "out of turns" in line]
    assert line.split()[:5] == ["greedy", "out", "of", "turns", "rate"] and line.split()[5] == "0.333"
    [line] = [line for line in shown(document(greedy=lost)) if "out of turns" in line]
    assert line.split()[5:7] == ["B", "0.333"] and "+0.333" in line
