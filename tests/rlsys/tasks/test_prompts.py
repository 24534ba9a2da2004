"""What a row of a data set asks: system prompts, further columns, rows of other trainers, rows without an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from minimal_config import minimal_with

from rlsys.config.rewards import RewardsConfig
from rlsys.config.tasks import DatasetConfig
from rlsys.errors import ConfigError, DataError
from rlsys.rewards import Rewards
from rlsys.tasks.dataset import DatasetTask
from rlsys.types import Message, Verdict

USER = {"role": "user", "content": "1 + 1?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def task_of(folder: Path, *rows: dict[str, Any], **fields: Any) -> DatasetTask:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetTask(DatasetConfig(path=str(path), held_out_every=2, **fields), 0)


def contents(question: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in question]


def test_a_system_prompt_makes_a_conversation_of_a_text(tmp_path: Path) -> None:
    rows = {"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}
    task = task_of(tmp_path, *rows, system_prompt="Think {first}.", prompt_template="Q: {question}")
    assert contents(task.problem("train", 0).question) == [("system", "Think {first}."), ("user", "Q: 1 + 1?")]
    assert set("Think Q:4") <= set(task.vocabulary())


def test_a_conversation_keeps_its_own_system_message(tmp_path: Path) -> None:
    rows = {"messages": [SYSTEM, USER], "answer": "2"}, {"messages": [USER], "answer": "2"}
    task = task_of(tmp_path, *rows, system_prompt="Other.")
    assert contents(task.problem("train", 0).question)[0] == ("system", "Be brief.")
    assert contents(task.problem("held_out", 0).question)[0] == ("system", "Other.")


def test_columns_fill_the_fields_of_the_template(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "passage": "Ann slept.", "level": 3, "info": {"hint": "a name"}, "answer": "Ann"},
        {"question": "Who?", "passage": "Bob ran.", "level": None, "info": {"hint": ""}, "answer": "Bob"},
    ]
    task = task_of(tmp_path, *rows, prompt_template="{passage} [{level}] {question} ({info.hint}) {question}")
    assert task.problem("train", 0).question == "Ann slept. [3] Who? (a name) Who?"
    assert task.problem("held_out", 0).question == "Bob ran. [] Who? () Who?"  # another question: it is not left out
    assert task.notes() == ()


def test_a_missing_column_of_the_template_is_named(tmp_path: Path) -> None:
    rows = {"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}
    with pytest.raises(DataError) as caught:
        task_of(tmp_path, *rows, prompt_template="{context} {question}").size("train")
    assert "task.prompt_template: " in caught.value.message
    assert "has no column 'context'; its columns are question, answer" in caught.value.message
    listed = {**rows[0], "context": ["x"]}
    with pytest.raises(DataError, match=r"column 'context': expected text, found"):
        task_of(tmp_path, listed, *rows, prompt_template="{context} {question}").size("train")


@pytest.mark.parametrize("prompt", ["1 + 1?", [USER]], ids=["text", "messages"])
@pytest.mark.parametrize("answer", ["answer", "solution", "ground_truth"])
def test_rows_of_trl(tmp_path: Path, prompt: Any, answer: str) -> None:
    other = {"prompt": "other", answer: "3", "level": 2}
    problem = task_of(tmp_path, {"prompt": prompt, answer: "2", "level": 1}, other).problem("train", 0)
    expected = "1 + 1?" if isinstance(prompt, str) else (Message(role="user", content="1 + 1?"),)
    assert (problem.question, problem.answer, problem.metadata["level"]) == (expected, "2", 1)


def test_rows_of_verl_in_parquet(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        return {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{number} + 1?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
            "extra_info": {"split": "train", "index": number},
        }

    path = tmp_path / "train.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([row(1), row(2)]), path)
    problem = DatasetTask(DatasetConfig(path=str(path), held_out_every=2), 0).problem("train", 0)
    assert (contents(problem.question), problem.answer) == ([("user", "1 + 1?")], "2")
    assert problem.metadata["data_source"] == "openai/gsm8k"
    assert problem.metadata["extra_info"] == {"split": "train", "index": 1}


def test_a_data_set_without_answers_is_judged_by_the_functions(tmp_path: Path) -> None:
    task = task_of(tmp_path, {"prompt": "Say a."}, {"prompt": "Say b."}, answer_column=None)
    problem = task.problem("train", 0)
    assert (problem.question, problem.answer) == ("Say a.", "")
    assert task.notes() == ("task.answer_column null: a completion counts as right if its reward is above 0",)
    own = task.verify(problem, "a")
    assert own == Verdict(outcome="ok", reward=0.0, answered=True) and not own.correct
    assert not task.verify(problem, "a", False).answered and not task.verify(problem, " ").answered
    (tmp_path / "mine.py").write_text("def f(completions, **kw): return [{'a': 0.5, 'b': -1}.get(completions[0])]")
    rewards = Rewards(RewardsConfig.model_validate({"functions": [{"fn": "mine.py:f", "weight": 2}]}), str(tmp_path))
    right, wrong, neither = (rewards.verdict(problem, text, task.verify(problem, text)) for text in ("a", "b", "c"))
    assert (right.outcome, right.reward, right.correct, right.parts) == ("ok", 1.0, True, {"f": 0.5})
    assert (wrong.outcome, wrong.reward, wrong.correct) == ("wrong", -2.0, False)
    assert (neither.outcome, neither.detail) == (
        "error",
        "no reward: every function gave None, and the task gives none",
    )


def test_prompts_alone_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompt-only rows.*; without answers, set task\.answer_column to null"):
        task_of(tmp_path, {"prompt": "a"}, {"prompt": "b"}).size("train")
    with pytest.raises(ConfigError, match=r"task\.answer_column null: nothing judges the completions"):
        minimal_with(["task={type: dataset, path: x, answer_column: null}"])
