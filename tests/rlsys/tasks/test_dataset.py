"""The data set task: sources, splits, unreadable rows, references, and the rules of its verdicts."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pyarrow.parquet
import pytest
from problems import problem_of

from rlsys.config.tasks import DatasetConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tasks import build_task
from rlsys.tasks.dataset import DatasetTask
from rlsys.tasks.tags import tag_strings

GSM8K = Path(os.environ.get("RLSYS_DATA", "")) / "gsm8k_test.jsonl"


def write_jsonl(path, rows):
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count):
    """Return rows whose question is i + i, for i from 1."""
    return [{"question": f"{i} + {i}?", "answer": 2 * i} for i in range(1, count + 1)]


def task_of(path, **fields):
    return DatasetTask(DatasetConfig(path=str(path), **fields), seed=0)


def all_ids(task, split):
    return [task.problem(split, index).problem_id for index in range(task.size(split))]


def test_jsonl_rows_in_file_order_every_fifth_held_out(tmp_path):
    task = task_of(write_jsonl(tmp_path / "a.jsonl", sums(11)), held_out_every=5)
    assert all_ids(task, "train") == [f"train/{i}" for i in (1, 2, 3, 4, 6, 7, 8, 9, 11)]
    assert all_ids(task, "held_out") == ["held_out/5", "held_out/10"]
    assert task.problem("train", 4).question == "6 + 6?"
    assert task.problem("train", 4).answer == "12"
    assert task.notes() == ()
    assert task.demonstration(0, random.Random(0)) is None


@pytest.mark.parametrize("index", [-1, 2])
def test_index_outside_the_split_is_an_index_error(tmp_path, index):
    task = task_of(write_jsonl(tmp_path / "a.jsonl", sums(4)), held_out_every=2)
    with pytest.raises(IndexError):
        task.problem("train", index)


@pytest.mark.heavy
def test_parquet_and_hugging_face_folder_give_the_same_problems(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_list(sums(6))
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "loadable").mkdir()
    data.to_parquet(str(tmp_path / "loadable" / "train.parquet"))
    sources = [tmp_path / name for name in ("a.parquet", "single", "splits", "loadable")]
    sources.append(write_jsonl(tmp_path / "a.jsonl", sums(6)))
    tasks = [task_of(source, held_out_every=3) for source in sources]
    problems = [[task.problem("train", index) for index in range(task.size("train"))] for task in tasks]
    assert [problem.answer for problem in problems[0]] == ["2", "4", "8", "10"]
    assert all(other == problems[0] for other in problems[1:])


@pytest.mark.heavy
def test_held_out_split_of_a_hugging_face_folder(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(sums(6))
    splits = {"train": rows.select(range(4)), "test": rows.select([4, 5])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    task = task_of(tmp_path / "d", held_out_path=str(tmp_path / "d"))
    assert (task.size("train"), task.size("held_out")) == (4, 2)
    with pytest.raises(DataError, match=r"task\.path .* no split 'dev'; the splits are train, test"):
        task_of(tmp_path / "d", split="dev").size("train")


def test_a_data_set_of_several_configurations(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "several"
    folder.mkdir()
    for name, rows in (("main", sums(6)), ("small", sums(3))):
        write_jsonl(folder / f"{name}.jsonl", rows)
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "small"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    assert task_of(folder, subset="small", held_out_every=3).size("train") == 2
    assert task_of(folder, subset="main", held_out_every=3).size("train") == 4
    with pytest.raises(DataError, match=r"task\.path .*set task\.subset: .*'main', 'small'"):
        task_of(folder).size("train")


def test_the_digest_follows_the_rows(tmp_path):
    def digest(rows):
        return task_of(write_jsonl(tmp_path / "a.jsonl", rows), held_out_every=3).digest()

    before = digest(sums(6))
    assert digest(sums(6)) == before
    assert len({before, digest(sums(7)), digest([*sums(5), {"question": "6 + 6?", "answer": 13}])}) == 3


def test_training_rows_that_repeat_a_held_out_question_are_left_out(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", sums(4))
    held_out = write_jsonl(tmp_path / "test.jsonl", sums(2))
    task = task_of(train, held_out_path=held_out)
    assert all_ids(task, "train") == ["train/3", "train/4"]
    assert task.notes() == ("task.path: 2 of 4 training rows left out: their questions are held out",)
    with pytest.raises(DataError, match="no row is left for training; 4 of its questions are also held out"):
        task_of(train, held_out_path=train).size("train")


def test_environment_variables_in_paths(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", sums(4))
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    assert task_of("${SOME_DATA}/a.jsonl", held_out_every=2).size("train") == 2
    monkeypatch.delenv("SOME_DATA")
    with pytest.raises(ConfigError, match=r"task\.path .*SOME_DATA is not set"):
        task_of("${SOME_DATA}/a.jsonl").size("train")


BAD_ROWS = {
    "{broken": "not JSON",
    "[1, 2]": "expected a JSON object, found list",
    '{"question": "q", "answer": "#### 1", "answer": "#### 2"}': ":3: column answer: expected it once in a row",
    '{"question": "", "answer": "1"}': "'question': expected text, found ''",
    '{"question": "q", "answer": null}': "'answer': expected text, found null",
    '{"question": ["q"], "answer": "#### 1"}': "'question': expected text",
    '{"question": "q"}': "'answer': missing in this row",
    '{"question": "q", "answer": "1"}': "no answer that matches task.answer_pattern",
    '{"question": "q", "answer": NaN}': "'answer': expected text, found float 'nan'",
    '{"question": "\\ud800", "answer": "#### 1"}': "'question': expected text",
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_unreadable_row_is_skipped_counted_and_explained(tmp_path, bad):
    good = [{"question": f"q{i}", "answer": f"so #### {i}"} for i in range(7)]
    path = write_jsonl(tmp_path / "a.jsonl", [*good[:2], bad, *good[2:]])
    # 1 of 8 rows is bad. A max_bad_rows of 0.125 allows it, 0.124 does not.
    task = task_of(path, answer_pattern="#### (.+)", max_bad_rows=0.125, held_out_every=4)
    [note] = task.notes()
    assert note.startswith(f"task.path: 1 of 8 rows skipped, the first: {path}:3: ") and BAD_ROWS[bad] in note
    assert all_ids(task, "train") == [f"train/{i}" for i in (1, 2, 5, 6, 7)]
    limit = r"more than task\.max_bad_rows 0\.124; mend or remove them, or raise it"
    with pytest.raises(DataError, match=rf"1 of 8 rows are unreadable, {limit}; the first: .*:3: "):
        task_of(path, answer_pattern="#### (.+)", max_bad_rows=0.124).size("train")


def test_a_note_has_the_reasons_of_the_first_skipped_rows(tmp_path):
    bad = [{"question": "q", "answer": None}] * 4
    good = [{"question": f"q{n}", "answer": "1"} for n in range(4)]
    task = task_of(write_jsonl(tmp_path / "a.jsonl", [*good, *bad]), max_bad_rows=0.5, held_out_every=4)
    [note] = task.notes()
    assert "4 of 8 rows skipped" in note and note.count("a.jsonl:") == note.count("expected text") == 3


def test_bytes_that_are_not_utf8_are_one_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row).encode() for row in sums(4)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join([*lines, b'{"question": "\xff", "answer": 1}']))
    task = task_of(path, max_bad_rows=0.2, held_out_every=3)
    # Blank lines count as lines, not as rows. A byte order mark is allowed.
    assert task.notes() == (f"task.path: 1 of 5 rows skipped, the first: {path}:9: not UTF-8",)
    assert all_ids(task, "train") == ["train/1", "train/5", "train/7"]


def test_a_parquet_file_with_a_column_twice(tmp_path):
    path, texts = tmp_path / "a.parquet", pyarrow.array(["q"])
    table = pyarrow.Table.from_arrays([texts] * 3, names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"task\.path .*a\.parquet, column answer: expected it once, found it 2 times$"):
        task_of(path).size("train")


def test_unusable_data_sets_say_what_to_change(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "folder").mkdir()
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "q", "solution": "1"}] * 4)
    cases = [
        ({"path": str(tmp_path / "none.jsonl")}, r"task\.path .*none\.jsonl: no such file"),
        ({"path": str(tmp_path / "none")}, r"task\.path .*none: no such file or folder"),
        ({"path": str(tmp_path / "empty.jsonl")}, r"task\.path .*: expected at least one row, found none"),
        ({"path": str(tmp_path / "broken.parquet")}, r"task\.path .*: not a readable Parquet file"),
        ({"path": str(tmp_path / "folder")}, r"task\.path .*: not a readable data set"),
        ({"path": path}, r"task\.question_column: .*no column 'question'; its columns are problem, solution"),
        (
            {"path": path, "question_column": "problem", "answer_column": "solution"},
            r"one in task\.held_out_every 10 of task\.path .*: no row is left for evaluation; lower .*, add rows",
        ),
        ({"path": path, "answer_pattern": "("}, r"task\.answer_pattern '\(': not a regular expression"),
        ({"path": path, "answer_pattern": "a"}, r"task\.answer_pattern 'a': expected a group"),
    ]
    for fields, message in cases:
        with pytest.raises(ConfigError, match=message):
            DatasetTask(DatasetConfig(**fields), seed=0).size("train")


def test_template_demonstrations_and_vocabulary(tmp_path):
    rows = [
        {"question": r"\frac{a}{b}", "answer": "β", "work": "so z"},
        {"question": "c", "answer": "1", "work": "d"},
    ]
    task = build_task(
        DatasetConfig(
            path=write_jsonl(tmp_path / "a.jsonl", rows),
            held_out_every=2,
            demonstration_column="work",
            prompt_template=r"\x{x} {question}!",
        ),
        0,
    )
    problem, text = task.demonstration(0, random.Random(0))
    assert problem.question == r"\x{x} \frac{a}{b}!"
    assert text == "so z"
    tags, characters = tag_strings(), task.vocabulary()[len(tag_strings()) :]
    assert task.vocabulary()[: len(tags)] == tags
    assert list(characters) == sorted(set(characters))
    assert set(r"\frac{a}{b}βso zcd1x!") <= set(characters)
    assert pickle.loads(pickle.dumps(task)).problem("train", 0) == problem


@pytest.mark.parametrize(
    ("fields", "completion", "finished", "reward", "answered"),
    [
        ({}, "so <answer>18</answer>", True, 1, True),
        ({}, "so <answer>18</answer> and", False, 0, False),
        ({"accept_cut_off": True}, "so <answer>18</answer> and", False, 1, True),
        ({}, "<answer>17.99</answer>", True, 0, True),
        ({}, "<answer>36/2</answer>", True, 1, True),
        ({"strictness": "text"}, "<answer>36/2</answer>", True, 0, True),
        ({"strictness": "lenient"}, "<answer>18%</answer>", True, 1, True),
    ],
)
def test_the_config_chooses_the_rules_of_the_judge(fields, completion, finished, reward, answered):
    verdict = task_of("unread.jsonl", **fields).verify(problem_of("18"), completion, finished)
    assert (verdict.reward, verdict.answered) == (reward, answered)


def test_the_config_chooses_the_tolerance():
    rewards = [
        task_of("unread.jsonl", relative_tolerance=value).verify(problem_of("2.5"), "<answer>2.51</answer>").reward
        for value in (1e-6, 0.01)
    ]
    assert rewards == [0, 1]


def test_notes_name_references_that_cannot_be_verified(tmp_path):
    rows = [*sums(6), {"question": "q", "answer": "1, 2, \\ldots, n"}, {"question": "r", "answer": "so </answer>"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    (note,) = task_of(path, held_out_every=4).notes()
    assert note == (
        "task.path: 2 of 8 references cannot be verified by value, the first: row 7 '1, 2, \\\\ldots, n': only as "
        "text: the command \\ldots"
    )
    held_out = write_jsonl(tmp_path / "b.jsonl", rows[-1:])
    notes = task_of(write_jsonl(tmp_path / "c.jsonl", sums(3)), held_out_path=held_out).notes()
    (line,) = notes
    assert line.startswith("task.held_out_path: 1 of 1 references cannot be verified by value, ")


def test_questions_with_different_answers_are_noted(tmp_path):
    rows = [{"question": f"{n // 2}?", "answer": str(n)} for n in range(4)] + sums(4)
    held_out = write_jsonl(tmp_path / "held.jsonl", rows[:1])
    path = write_jsonl(tmp_path / "a.jsonl", rows + rows[4:])
    notes = task_of(path, held_out_path=held_out).notes()
    assert (
        "task.path: 2 questions have rows with different answers, the first: row 1 with '0' and row 2 with '1'" in notes
    )
    others = [{"question": f"other {n}?", "answer": "1"} for n in range(3)]
    notes = task_of(write_jsonl(tmp_path / "b.jsonl", others), held_out_path=path).notes()
    assert any(note.startswith("task.held_out_path: 2 questions have rows with different answers") for note in notes)


@pytest.mark.heavy
@pytest.mark.skipif(not GSM8K.is_file(), reason="RLSYS_DATA names no folder with gsm8k_test.jsonl")
def test_every_gsm8k_reference_verifies_against_itself_only():
    task = task_of("${RLSYS_DATA}/gsm8k_test.jsonl", answer_pattern="#### (.+)", held_out_every=2)
    problems = [task.problem(split, i) for split in ("train", "held_out") for i in range(task.size(split))]
    assert len(problems) == 1319
    assert task.notes() == ()
    for problem in problems:
        wrong = int(problem.answer.replace(",", "")) + 1
        completions = [f"<answer>{problem.answer}</answer>", rf"so \boxed{{{problem.answer}}}"]
        completions += [f"<answer>{wrong}</answer>", rf"so \boxed{{{wrong}}}"]
        rewards = [task.verify(problem, completion).reward for completion in completions]
        assert rewards == [1, 1, 0, 0], problem
