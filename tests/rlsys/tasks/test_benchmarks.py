"""Benchmarks by name, on rows with the columns of the published data sets.

Columns and splits: cards of the data sets on the Hugging Face hub, and the loaders of published evaluations.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
from minimal_config import minimal_with

from rlsys.config.outside_tasks import BenchmarkConfig, BenchmarkName
from rlsys.errors import ConfigError, DataError
from rlsys.tasks import build_task
from rlsys.tasks.benchmarks import BENCHMARKS, dataset_config

DATA = os.environ.get("RLSYS_DATA", "")
DOCS = Path(__file__).parents[3] / "docs" / "tasks.md"
NONE = dict.fromkeys(f"image_{number}" for number in range(1, 6))
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "gsm8k": ({"question": "Four cups and three?", "answer": "4 + 3 = <<4+3=7>>7\n#### 7"}, "7"),
    "math500": (
        {"problem": "Half of $x$ at 3?", "solution": r"\boxed{\frac{3}{2}}", "answer": r"\frac{3}{2}",
         "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
        "1.5",
    ),
    "aime24": (
        {"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"}, "204",
    ),
    "aime25": ({"problem": "p", "answer": "70", "id": "0"}, "70"),
    "amc": ({"id": 0, "question": "p", "answer": "27.0", "url": "u"}, "27"),
    "olympiad": (
        {"id": 1606, "question": "q", "context": None, "solution": ["s"], "final_answer": ["$2$"], "unit": None,
         "is_multiple_answer": False, "answer_type": "Numerical", "error": None, "subfield": "Algebra", **NONE},
        "2",
    ),
    "minerva": ({"question": "q", "answer": "4.5e33"}, r"4.5 \times 10^{33}"),
}  # fmt: skip


def task_of(name: Any, folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Any:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_task(BenchmarkConfig(name=name, path=str(path), **fields), 0)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_benchmark_are_read_asked_and_judged(name: Any, tmp_path: Path) -> None:
    row, right = ROWS[name]
    task = task_of(name, tmp_path, [row])
    assert (task.size("train"), task.size("held_out"), task.notes()) == (0, 1, ())
    problem = task.problem("held_out", 0)
    assert problem.question.startswith(row[BENCHMARKS[name].question])
    assert problem.question.endswith("\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert task.verify(problem, rf"So \boxed{{{right}}}.").correct
    assert not task.verify(problem, r"So \boxed{11}.").correct


def test_every_benchmark_has_a_row_here_and_in_the_docs() -> None:
    assert [*ROWS, "ifeval", "multi_if"] == list(BENCHMARKS) == list(get_args(BenchmarkName))
    table = [line.split("|") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    documented = {cells[1].strip(" `"): "|".join(cells[2:]) for cells in table}
    for name, benchmark in BENCHMARKS.items():
        names = [benchmark.path, benchmark.split, benchmark.question, benchmark.subset, benchmark.answer]
        assert [each for each in names if each and f"`{each}`" not in documented[name]] == []


def test_training_problems_of_a_benchmark() -> None:
    config = dataset_config(BenchmarkConfig(name="gsm8k"))
    assert (config.path, config.split, config.held_out_path) == ("openai/gsm8k", "train", "openai/gsm8k")
    assert (config.held_out_split, config.subset) == ("test", "main")
    config = dataset_config(BenchmarkConfig(name="aime24"))
    assert (config.path, config.split, config.held_out_path) == ("HuggingFaceH4/aime_2024", "train", None)


def test_a_training_problem_that_is_held_out_is_left_out(tmp_path: Path) -> None:
    row = {"problem": "p", "answer": "1"}
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(each) + "\n" for each in (row, {"problem": "q", "answer": "2"})))
    task = task_of("math500", tmp_path, [row], train_path=str(train), system_prompt="Be brief.")
    assert (task.size("train"), task.size("held_out")) == (1, 1)
    assert task.notes() == ("task.train_path: 1 of 2 training rows left out: their questions are held out",)
    assert [message.role for message in task.problem("train", 0).question] == ["system", "user"]


def test_files_with_other_columns_and_unreadable_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^task\.name aime25: .* has no column 'problem'; its") as caught:
        task_of("aime25", tmp_path, [{"Problem": "p", "Answer": 3}]).size("held_out")
    assert caught.value.message.endswith(
        "its columns are Problem, Answer; expected math-ai/aime25, or a copy of it with the columns problem and "
        "answer; task.type dataset reads other files"
    )
    with pytest.raises(DataError, match=r"1 of 2 rows are unreadable"):
        task_of("aime25", tmp_path, [{"problem": "p", "answer": None}, {"problem": "q", "answer": 3}]).size("held_out")
    with pytest.raises(ConfigError, match=r"must contain \{question\}"):
        minimal_with(["task={type: benchmark, name: amc, prompt_template: Solve.}"])


@pytest.mark.skipif(not DATA, reason="RLSYS_DATA names no folder with the data sets")
@pytest.mark.parametrize(
    ("name", "file", "count", "undecided"),
    [("gsm8k", "gsm8k_test", 1319, 0), ("math500", "math500", 500, 0), ("aime24", "aime24", 30, 0)],
)
def test_whole_benchmarks(name: Any, file: str, count: int, undecided: int) -> None:
    task = build_task(BenchmarkConfig(name=name, path=f"{DATA}/{file}.jsonl"), 0)
    assert task.size("held_out") == count
    assert sum("cannot be verified by value" in note for note in task.notes()) == undecided
    problem = task.problem("held_out", 0)
    assert task.verify(problem, rf"\boxed{{{problem.answer}}}").correct
