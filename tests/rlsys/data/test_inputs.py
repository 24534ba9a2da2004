"""The inputs of a command, checked before anything is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.data.inputs import TOKENIZER, Inputs
from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder
from rlsys.models.scratch import build_from_scratch

TINY = {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16, "max_positions": 512}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A byte-level tokenizer: a text of n letters has n tokens, and a prompt two more."""
    folder = tmp_path_factory.mktemp("model")
    values = {"run": {"dir": "x"}, "model": {"from_scratch": TINY}, "task": {"type": "letter_count"}}
    scratch = parse_config(values, "test").model.from_scratch
    assert scratch
    build_from_scratch(scratch, [], 0, folder)
    return ModelFolder(folder)


def rows(count: int, **last: str) -> list[dict[str, str]]:
    data = [{"question": f"q{i:03d}", "answer": "1", "solution": "s" * 4} for i in range(count)]
    return [*data[:-1], {**data[-1], **last}]


def config(folder: Path, data: Sequence[Mapping[str, Any]], **sections: Any) -> Config:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    values: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"path": "unused"},
        "task": {"type": "dataset", "path": str(path), "held_out_every": 9, "demonstration_column": "solution"},
        "actors": {"max_model_len": 32},
        "sampling": {"max_tokens": 16},
        "warm_start": {"rows_per_step": 2},
    }
    return parse_config({**values, **sections}, "test")


def test_every_demonstration_is_checked_and_only_where_it_is_needed(model: ModelFolder, tmp_path: Path) -> None:
    long = rows(26, solution="s" * 40)
    with pytest.raises(ConfigError, match=r"demonstration of train/26 has 47 tokens, actors\.max_model_len is 32"):
        Inputs(config(tmp_path, long), model)
    Inputs(config(tmp_path, long, stages=["online"]), model)


def test_every_prompt_is_checked(model: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt train/26 has 22 tokens; .* leaves 16"):
        Inputs(config(tmp_path, rows(26, question="q" * 20)), model)


def test_an_evaluation_checks_only_what_it_samples(model: ModelFolder, tmp_path: Path) -> None:
    inputs = Inputs(config(tmp_path, rows(26, question="q" * 20, solution="s" * 40)), model, training=False)
    assert [prompt.prompt_id for prompt in inputs.held_out] == ["held_out/9", "held_out/18"]
    long = [{**row, "question": "q" * 20 + row["question"]} for row in rows(26)]
    # Tokens: 2, and 20 + 4 letters.
    with pytest.raises(ConfigError, match=r"prompt held_out/\d+ has 26 tokens"):
        Inputs(config(tmp_path, long), model, training=False)


def with_tokens(model: ModelFolder, folder: Path, *tokens: str, **special: str) -> ModelFolder:
    """Return a copy of a model whose tokenizer has tokens that the model does not have."""
    copy = ModelFolder(Path(shutil.copytree(model.path, folder)))
    copy.tokenizer.add_tokens(list(tokens))
    copy.tokenizer.add_special_tokens(special)
    return copy


def test_prompts_and_demonstrations_have_only_tokens_of_the_model(model: ModelFolder, tmp_path: Path) -> None:
    larger = with_tokens(model, tmp_path / "larger", "<new>")
    Inputs(config(tmp_path, rows(26)), larger)
    for column in ("question", "solution"):
        with pytest.raises(ConfigError, match=r"token id \d+ \('<new>'\) is beyond the vocabulary of the model"):
            Inputs(config(tmp_path, rows(26, **{column: "<new>"})), larger)


def test_rows_of_files_have_only_tokens_of_the_model(model: ModelFolder, tmp_path: Path) -> None:
    larger = with_tokens(model, tmp_path / "larger", "<new>")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "<new>"}) + "\n")
    with pytest.raises(ConfigError, match=r"expected token ids from 0 to \d+ \(the policy's vocabulary\)"):
        Inputs(config(tmp_path, rows(26), stages=["sft"], sft={"path": str(path)}), larger)


def test_a_padding_token_that_the_model_lacks_is_not_used(model: ModelFolder, tmp_path: Path) -> None:
    larger = with_tokens(model, tmp_path / "larger", **{"pad_token": "<new pad>"})
    assert larger.tokenizer.pad_token_id >= larger.vocabulary
    assert Inputs(config(tmp_path, rows(26)), larger).pad_token_id == larger.tokenizer.eos_token_id
    assert Inputs(config(tmp_path, rows(26)), model).pad_token_id == model.tokenizer.pad_token_id


def test_every_prompt_has_its_question(model: ModelFolder, tmp_path: Path) -> None:
    without = with_tokens(model, tmp_path / "without")
    without.tokenizer.chat_template = "{{ messages[0].content if 'q025' not in messages[0].content else 'none' }}"
    with pytest.raises(ConfigError, match="expected the question in its prompt, found 'none' for 'q025'"):
        Inputs(config(tmp_path, rows(26)), without)


def test_generated_prompts_are_checked(model: ModelFolder, tmp_path: Path) -> None:
    # Tokens: 2 and `count x in ` 11, and 3 to 5 letters: the longest that is allowed has 16, so 4 letters fail.
    task = {"type": "letter_count", "min_length": 3, "max_length": 5}
    with pytest.raises(ConfigError, match=r"prompt train-\d+ has 1[78] tokens; .* leaves 16"):
        Inputs(config(tmp_path, rows(20), task=task, evaluation={"prompts": 1}, stages=["online"]), model)


def test_notes_name_skipped_rows(model: ModelFolder, tmp_path: Path) -> None:
    assert Inputs(config(tmp_path, rows(20)), model).notes == []
    settings = config(tmp_path, rows(20, answer=""))
    settings = settings.model_copy(update={"task": settings.task.model_copy(update={"max_bad_rows": 0.1})})
    [note] = Inputs(settings, model).notes
    assert note.startswith("task.path: 1 of 20 rows skipped, the first: ") and "data.jsonl:20" in note


def test_rows_that_are_too_long_are_left_out_and_counted(model: ModelFolder, tmp_path: Path) -> None:
    def tolerant(longest: int, *, demonstrations: bool = True) -> Inputs:
        data = [*rows(20, question="q" * 30, solution="s" * 60), *rows(10, solution="s" * 40), *rows(10)]
        data = [{**row, "question": f"{row['question']}{n:02d}"} for n, row in enumerate(data)]
        settings = config(
            tmp_path, data, actors={"max_model_len": longest}, **({} if demonstrations else {"stages": ["online"]})
        )
        return Inputs(
            settings.model_copy(update={"task": settings.task.model_copy(update={"max_bad_rows": 0.1})}), model
        )

    inputs = tolerant(40)
    assert [note.partition(", the first")[0] for note in inputs.notes] == [
        "task: 1 of 36 training prompts left out",
        "task: 2 of 36 demonstrations left out",
    ]
    taken = {inputs.prompts.take()[1].prompt_id.partition("@")[0] for _ in range(35)}
    assert len(taken) == 35 and "train/20" not in taken
    # A resume with other limits would train on other rows in another order.
    prints = [tolerant(40), tolerant(60), tolerant(120), tolerant(40, demonstrations=False)]
    assert len({each.fingerprint()["task.path"] for each in prints}) == 4
    assert tolerant(40).fingerprint() == inputs.fingerprint()


def test_messages_of_a_data_set_go_through_the_chat_template(model: ModelFolder, tmp_path: Path) -> None:
    data: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": f"q{n:02d}"}], "reward_model": {"ground_truth": "1"}} for n in range(20)
    ]
    task = {"type": "dataset", "held_out_every": 9, "path": str(tmp_path / "data.jsonl")}
    inputs = Inputs(config(tmp_path, data, task=task, stages=["online"]), model)
    plain = [{"question": f"q{n:02d}", "answer": "1"} for n in range(20)]
    same = Inputs(config(tmp_path, plain, task=task, stages=["online"]), model)
    assert [each.token_ids.tolist() for each in inputs.held_out] == [each.token_ids.tolist() for each in same.held_out]


def test_the_fingerprint_follows_data_model_and_tokenizer(model: ModelFolder, tmp_path: Path) -> None:
    before = Inputs(config(tmp_path, rows(20)), model).fingerprint()
    assert set(before) == {"task.path", "model.path", TOKENIZER}
    assert Inputs(config(tmp_path, rows(20)), model).fingerprint() == before

    def changed(data: list[dict[str, str]], folder: Path) -> set[str]:
        now = Inputs(config(tmp_path, data), ModelFolder(folder)).fingerprint()
        return {name for name in before if now[name] != before[name]}

    assert changed(rows(20, answer="2"), model.path) == {"task.path"}
    other = tmp_path / "model"
    shutil.copytree(model.path, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<user>{{", "<user>{{ '' }}{{"))
    assert changed(rows(20), other) == {TOKENIZER}
    (other / "config.json").write_text((model.path / "config.json").read_text().replace("100.0", "200.0"))
    assert changed(rows(20), other) == {TOKENIZER, "model.path"}


FILES = {"stages": ["sft", "preference"], "objective": {"preference": {"weight": 1.0}}}


def with_files(folder: Path, rows_: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> Config:
    for name, lines in (("sft", rows_), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {"sft": {"path": str(folder / "sft.jsonl")}, "preference": {"path": str(folder / "pairs.jsonl")}}
    return config(folder, rows(20), **FILES, **paths)


TEXT = {"prompt": "<user>a<assistant>", "completion": "bc"}
SIDES = {"prompt": "<user>a<assistant>", "chosen": "bc", "rejected": "bd"}


def test_data_files_are_read_with_the_tokenizer_of_the_policy(model: ModelFolder, tmp_path: Path) -> None:
    inputs = Inputs(with_files(tmp_path, [TEXT], [SIDES, {**SIDES, "rejected": "bc"}]), model)
    assert inputs.notes == [
        "sft: 1 rows",
        "preference: 1 pairs",
        f"preference.path {tmp_path / 'pairs.jsonl'}: 1 of 2 pairs left out: 1 whose sides are equal",
    ]
    row = inputs.data.batch("sft", 0).demonstrations[0]
    # Special tokens in the text are tokens, none is added before it, and the end token follows.
    assert (len(row.token_ids), row.loss_mask.tolist()) == (6, [False] * 3 + [True] * 3)
    pair = inputs.data.batch("preference", 0).pairs[0]
    assert (pair.prompt_length, pair.common, len(pair.chosen_ids)) == (3, 4, 6)
    assert pair.chosen_ids[-1] == row.token_ids[-1]


def test_bad_data_files_are_found_before_the_start(model: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.path .*: row 1, column completion: 34 tokens .*max_model_len is 32"):
        Inputs(with_files(tmp_path, [{**TEXT, "completion": "b" * 30}], [SIDES]), model)
    bad = with_files(tmp_path, [TEXT], [{"prompt": "a"}])
    with pytest.raises(ConfigError, match=r"preference\.path .* expected the columns chosen_ids \+ "):
        Inputs(bad, model)
    Inputs(bad, model, training=False)  # an evaluation does not need them


def test_the_fingerprint_follows_the_data_files(model: ModelFolder, tmp_path: Path) -> None:
    before = Inputs(with_files(tmp_path, [TEXT], [SIDES]), model).fingerprint()
    assert set(before) == {"task.path", "model.path", TOKENIZER, "sft.path", "preference.path"}
    now = Inputs(with_files(tmp_path, [TEXT, TEXT], [SIDES]), model).fingerprint()
    assert {name for name in before if now[name] != before[name]} == {"sft.path"}


def test_demonstrations_of_the_online_stage_are_checked_too(model: ModelFolder, tmp_path: Path) -> None:
    long, sft = rows(26, solution="s" * 40), {"weight": 0.5, "source": "demonstrations", "rows_per_step": 5}
    with pytest.raises(ConfigError, match=r"demonstration of train/26 has 47 tokens"):
        Inputs(config(tmp_path, long, stages=["online"], objective={"sft": sft}), model)
    inputs = Inputs(config(tmp_path, rows(26), objective={"sft": sft}), model)
    sizes = [len(inputs.data.batch(stage, 0).demonstrations) for stage in ("warm_start", "online")]
    assert sizes == [2, 5]


def test_the_fingerprint_follows_the_code_of_a_task_of_ones_own(
    model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from rlsys.tasks.base import BaseTask\nfrom rlsys.types import Problem\n"
        "class Task(BaseTask):\n"
        "    def __init__(self, seed): ...\n"
        "    def problem(self, split, index):\n"
        "        return Problem(problem_id=str(index), question=f'{split} {index}', answer='1')\n"
        "    def verify(self, problem, completion, finished=True): ...\n"
    )

    def prints(folder: Path, code: str) -> dict[str, str]:
        folder.mkdir()
        (folder / "mine.py").write_text(code)
        monkeypatch.chdir(folder)
        task = {"type": "custom", "fn": "mine.py:Task"}
        return Inputs(config(tmp_path, [], task=task, stages=["online"]), model).fingerprint()

    before, after = prints(tmp_path / "a", code), prints(tmp_path / "b", code + "\n")
    assert {name for name in before if after[name] != before[name]} == {"task.fn"}
