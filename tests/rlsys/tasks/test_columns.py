"""Questions and answers of rows: nested columns, messages, lists, numbers, and forms that are recognised."""

from __future__ import annotations

import json
import pickle
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlsys.config.tasks import DatasetConfig
from rlsys.errors import DataError
from rlsys.tasks.answers.judge import Judge
from rlsys.tasks.dataset import DatasetTask
from rlsys.types import Message, Problem

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}
REPLY = {"role": "assistant", "content": "so #### 2"}
MESSAGES = (Message(role="system", content="Be brief."), Message(role="user", content="1 + 1?"))


def task_of(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> DatasetTask:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetTask(DatasetConfig(path=str(path), **{"held_out_every": max(2, len(rows)), **fields}), seed=0)


def first(folder: Path, row: dict[str, Any], **fields: Any) -> Problem:
    """Return the problem of a row. A row of the same form with another question is held out."""
    path = folder / "held.jsonl"
    path.write_text(json.dumps({**row, **_other_question(row, fields)}) + "\n")
    return task_of(folder, [row], held_out_path=str(path), **fields).problem("train", 0)


def _other_question(row: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    other = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "#### 9"}]
    question = fields.get("question_column")
    names = [question.partition(".")[0]] if question else ["question", "prompt", "messages", "conversations"]
    name = question if question in row else next(name for name in names if name in row)
    if isinstance(row[name], dict):
        return {name: {**row[name], question.partition(".")[2]: "other"}}
    return {name: other if isinstance(row[name], list) else "other"}


VERL = {"data_source": "x", "prompt": [SYSTEM, USER], "reward_model": {"style": "rule", "ground_truth": "2"}}


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (VERL, {}),
        (VERL, {"question_column": "prompt", "answer_column": "reward_model"}),
        (VERL, {"question_column": "prompt", "answer_column": "reward_model.ground_truth"}),
        (VERL, {"question_column": "prompt"}),
        (VERL, {"answer_column": "reward_model.ground_truth"}),
        ({**VERL, "extra_info": {"answer": "2"}}, {"answer_column": "extra_info.answer"}),
        ({"conversations": [SYSTEM, USER], "answer": "2"}, {}),
        ({**VERL, "images": [], "image": None}, {}),
        ({"prompt": json.dumps([SYSTEM, USER]), "answer": "2"}, {}),
        (VERL, {"answer_column": "reward_model.ground_truth", "question_column": "prompt"}),
        ({"prompt": [SYSTEM, USER], "answer": "2"}, {}),
        ({"prompt": [SYSTEM, USER], "ground_truth": 2}, {}),
        ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, {"answer_pattern": "#### (.+)"}),
        ({"messages": [SYSTEM, USER, REPLY]}, {"answer_pattern": "#### (.+)"}),
        ({"messages": [SYSTEM, USER, REPLY], "answer": "2"}, {}),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1 + 1?"},
                               {"from": "gpt", "value": "2"}]},
            {},
        ),
        ({"question": [SYSTEM, USER], "answer": ["2"]}, {}),
        (
            {"question": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}], "name": None},
                          {"role": "user", "content": [{"type": "text", "text": t} for t in ("1 + ", "1?")]}],
             "answer": "2"},
            {},
        ),
    ],
)  # fmt: skip
def test_conversations_are_used_as_they_are(tmp_path: Path, row: dict[str, Any], fields: dict[str, Any]) -> None:
    problem = first(tmp_path, row, **fields)
    assert problem.question == MESSAGES
    assert problem.answer == "2"


def test_the_template_is_put_around_the_last_message_of_the_user(tmp_path: Path) -> None:
    earlier = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "{x}?"}]
    problem = first(tmp_path, {"prompt": earlier, "answer": "3"}, prompt_template=r"{question} Answer \text{only}.")
    assert [message.content for message in problem.question if isinstance(message, Message)] == [
        "1 + 1?", "2", r"{x}? Answer \text{only}.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        ("2", "2"), (2, "2"), (2.5, "2.5"), (1e-07, "1e-07"), (["2"], "2"), ([2], "2"), (["1", "2"], "1, 2"),
        ({"ground_truth": ["7"], "style": "rule"}, "7"), ({"ground_truth": 7}, "7"), ([REPLY], "so #### 2"),
    ],
)  # fmt: skip
def test_answers(tmp_path: Path, cell: Any, answer: str) -> None:
    assert first(tmp_path, {"question": "q", "answer": cell}).answer == answer


@pytest.mark.parametrize("cell", [[], [["2"]], ["2", None], {"other": "2"}, [""], True, None, [USER]])
def test_other_cells_are_no_answers(tmp_path: Path, cell: Any) -> None:
    good = [{"question": f"q{n}", "answer": "1"} for n in range(4)]
    task = task_of(tmp_path, [{"question": "q", "answer": cell}, *good], max_bad_rows=0.5)
    [note] = task.notes()
    assert " 1 of 5 rows skipped, " in note and "column 'answer': expected text, found" in note


LISTS_OF_VALUES = [
    ["1,234", "5"], ["(1,2)", "3"], ["[1,2)", "(3, 4]"], [r"\{1, 2\}", "3"], ["f(x,y)", "2"], ["a)", "b)"],
    ["$1,200", "x = 1"], ["yes", "no"], ["12,345 km", "1"],
]  # fmt: skip
LISTS_IN_LISTS = [
    ["1", "2,3"], ["1,2", "3"], ["1; 2", "3"], ["1 and 2", "3"], ["x = 1, y = 2", "x = 3"], ["1,234,5", "6"],
    ["Paris, France", "Rome"], ["(1", "2)"], ["1, 2)", "3"], [r"\foo, 3", "2"], ["0,5", "1"],
]  # fmt: skip


@pytest.mark.parametrize("cell", LISTS_OF_VALUES)
def test_the_entries_of_a_list_stay_apart(tmp_path: Path, cell: list[str]) -> None:
    answer = first(tmp_path, {"question": "q", "answer": cell}).answer
    assert answer == ", ".join(cell)
    assert Judge().verdict(answer, f"<answer>{answer}</answer>").reward == 1.0


@pytest.mark.parametrize("cell", LISTS_IN_LISTS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_list_in_a_list_is_unreadable_because_the_judge_would_flatten_it(
    tmp_path: Path, cell: list[str], nested: bool
) -> None:
    good = [{"question": f"q{n}", "answer": "1"} for n in range(4)]
    row = {"question": "q", "answer": {"ground_truth": cell} if nested else cell}
    task = task_of(tmp_path, [row, *good], max_bad_rows=0.5)
    [reason] = task.notes()
    assert " 1 of 5 rows skipped, " in reason
    assert "column 'answer': expected one value in each entry of a list, found" in reason
    assert "put an entry that is a list itself into brackets, or write the whole answer as one text" in reason
    assert "\n" not in reason
    assert first(tmp_path, {"question": "q", "answer": [", ".join(cell)]}).answer == ", ".join(cell)


def test_a_decimal_column_is_written_without_an_exponent(tmp_path: Path) -> None:
    numbers = [Decimal("2.50"), Decimal("0.0000001"), Decimal("7")]
    columns = {"question": ["a", "b", "c"], "answer": pa.array(numbers, pa.decimal128(20, 7))}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    task = DatasetTask(DatasetConfig(path=str(tmp_path / "a.parquet"), held_out_every=3), seed=0)
    answers = [task.problem("train", 0).answer, task.problem("train", 1).answer, task.problem("held_out", 0).answer]
    assert answers == ["2.5000000", "0.0000001", "7.0000000"]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"x": {"q": "1 + 1?", "a": "2"}}, {"question_column": "x.q", "answer_column": "x.a"}),
        ({"x": {"y": {"q": "1 + 1?"}}, "a": "2"}, {"question_column": "x.y.q", "answer_column": "a"}),
        ({"x.q": "1 + 1?", "a.b": {"c": "2"}}, {"question_column": "x.q", "answer_column": "a.b.c"}),
        ({"q": "1 + 1?", "x": '{"a": "2"}'}, {"question_column": "q", "answer_column": "x.a"}),
    ],
)
def test_a_dot_leads_into_a_nested_column(tmp_path: Path, row: dict[str, Any], fields: dict[str, Any]) -> None:
    problem = first(tmp_path, row, **fields)
    assert (problem.question, problem.answer) == ("1 + 1?", "2")


def test_a_demonstration_is_the_last_turn_of_the_assistant(tmp_path: Path) -> None:
    rows = [{"messages": [SYSTEM, {"role": "user", "content": f"{n}?"}, REPLY]} for n in range(3)]
    task = task_of(tmp_path, rows, answer_pattern="#### (.+)", demonstration_column="messages")
    demonstration = task.demonstration(0, random.Random(0))
    assert demonstration is not None and demonstration[1] == "so #### 2"
    assert "B" in task.vocabulary()  # characters of the system message


BAD_CONVERSATIONS: list[tuple[list[dict[str, Any]], str]] = [
    ([REPLY], "expected a message to reply to, found none"),
    ([SYSTEM], "expected a last message of the user or a tool, found one of the system"),
    ([USER, {"role": "user", "content": None}], "message 2: expected text as content"),
    ([USER, {"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 2: expected text as content"),
    ([{**USER, "tool_calls": [{"id": 1}]}], "message 1: expected role and content, found tool_calls"),
    ([{"role": 3, "content": "x"}], "message 1: expected a role, found 3"),
]


@pytest.mark.parametrize(("cell", "message"), BAD_CONVERSATIONS)
def test_conversations_that_cannot_be_used(tmp_path: Path, cell: Any, message: str) -> None:
    good = [{"prompt": [{"role": "user", "content": f"q{n}"}], "answer": "1"} for n in range(4)]
    task = task_of(tmp_path, [{"prompt": cell, "answer": "1"}, *good], max_bad_rows=0.5)
    [note] = task.notes()
    assert " 1 of 5 rows skipped, " in note and f"column 'prompt': {message}" in note


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"}, {},
            r"task\.question_column: .* its columns are prompt, chosen, rejected \(preference rows\); a task needs a "
            r"question .* in every row: its columns are .* question \+ answer, or those that task\.question_column",
        ),
        ({"prompt": "a", "completion": "b", "label": True}, {}, r"\(unpaired preference rows\); a task needs"),
        ({"prompt": "a"}, {}, r"its columns are prompt \(prompt-only rows\); set task\.question_column to one of them"),
        ({"instruction": "a", "input": "", "output": "b"}, {}, r"\(instruction rows\); set task\.question_column to o"),
        ({"instruction": "a", "response": "b"}, {}, r"\(instruction rows\); set task\.question_column to one"),
        ({"prompt": "a", "rationale": "b"}, {"question_column": "prompt"}, r"task\.answer_column: .*; set task\.ans"),
        ({"question": "a", "x": {"a": "b"}}, {"answer_column": "x.b"}, r"task\.answer_column: .* no column 'x\.b'"),
        (VERL, {"question_column": "problem"}, r"no column 'problem'; .* \(verl rows\); set task\.question_column"),
    ],
)  # fmt: skip
def test_rows_without_a_question_or_answer_are_named(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        task_of(tmp_path, [row], **fields).size("train")
    assert "\n" not in caught.value.message


def test_a_held_out_conversation_is_not_trained(tmp_path: Path) -> None:
    rows = [{"prompt": [SYSTEM, {"role": "user", "content": f"{n}?"}], "answer": "1"} for n in range(3)]
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps(rows[1]) + "\n")
    task = task_of(tmp_path, rows, held_out_path=str(path))
    assert task.size("train") == 2
    other = task_of(tmp_path, [{**row, "prompt": row["prompt"][1:]} for row in rows], held_out_path=str(path))
    assert other.size("train") == 3  # the system message makes another question
    assert other.digest() != task.digest()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": str([USER]), "answer": "2"}, "column 'prompt': expected messages as JSON, .* a Python list; write"),
        ({**VERL, "images": [{"path": "a.png"}]}, "column images: expected none, found images, which is not read"),
        ({"question": "q", "answer": "2", "image": {"bytes": ""}}, "column image: expected none"),
        ({"question": "q", "answer": float("inf")}, "column 'answer': expected text, found float 'inf'"),
        ({"question": "q", "answer": True}, "column 'answer': expected text, found bool 'True'"),
    ],
)
def test_a_row_that_would_lose_something_is_unreadable(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"1 of 1 rows are unreadable.*{message}"):
        task_of(tmp_path, [row]).size("train")


def test_the_first_row_may_lack_the_answer(tmp_path: Path) -> None:
    rows = [{**VERL, "reward_model": {"ground_truth": None}}, VERL, {**VERL, "prompt": "other"}]
    reason = f"{tmp_path}/a.jsonl:1: column 'reward_model.ground_truth': expected text, found null"
    notes = task_of(tmp_path, rows, max_bad_rows=0.5).notes()
    assert notes[0] == f"task.path: 1 of 3 rows skipped, the first: {reason}"


def test_a_row_without_a_column_that_others_have(tmp_path: Path) -> None:
    rows = [{"question": "q"}, *({"question": text, "answer": "1"} for text in "abc")]
    [note] = task_of(tmp_path, rows, max_bad_rows=0.5).notes()
    assert note.endswith("a.jsonl:1: column 'answer': missing in this row")


def test_an_exact_number_is_plain_text_that_travels_and_is_read_again(tmp_path: Path) -> None:
    """A run with such answers is sent to actors, saved and resumed."""
    rows = [{"question": "a", "answer": "X"}, {"question": "b", "answer": "X"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows).replace('"X"', "2.50"))
    config = DatasetConfig(path=str(path), held_out_every=2)
    problem = DatasetTask(config, seed=0).problem("train", 0)
    assert type(problem.answer) is str
    assert pickle.loads(pickle.dumps(problem)).answer == json.loads(json.dumps(problem.answer)) == "2.50"
    assert DatasetTask(config, seed=0).digest() == DatasetTask(config, seed=0).digest()
    path.write_text(path.read_text().replace("2.50", "2.5"))
    assert DatasetTask(config, seed=0).problem("train", 0).answer == "2.5"
