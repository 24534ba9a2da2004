"""Rows of text and of messages, in every form that TRL documents: their tokens, and the tokens that are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_rows import BAD, GOOD, NO_SYSTEM, REASONING, SYSTEM, USER, reader, tokenizer, write

from rlsys.data.rows import PairRows, SupervisedRows
from rlsys.errors import ConfigError, DataError
from rlsys.models.chat import encode_prompt
from rlsys.types import Message

pytestmark = pytest.mark.heavy


def supervised(folder: Path, *rows: dict[str, Any], encoder: Any = None, **options: Any) -> SupervisedRows:
    return reader(encoder, **options).supervised(write(folder, *rows), "sft.path")


def pairs(folder: Path, *rows: dict[str, Any], encoder: Any = None) -> PairRows:
    return reader(encoder).pairs(write(folder, *rows), "preference.path")


def parts(rows: SupervisedRows, number: int = 0, encoder: Any = None) -> tuple[str, str]:
    """Return the text of a row that is not trained, and the text that is."""
    row, encoder = rows.row(number), encoder or tokenizer()
    trained = row.loss_mask.tolist()
    start = trained.index(True)
    assert all(trained[start:])
    return encoder.decode(row.token_ids[:start]), encoder.decode(row.token_ids[start:])


def sides(rows: PairRows, number: int = 0) -> tuple[str, str, str]:
    """Return the texts of the prompt and of both sides after it."""
    row = rows.row(number)
    assert row.chosen_ids[: row.prompt_length].tolist() == row.rejected_ids[: row.prompt_length].tolist()
    prompt, chosen, rejected = (
        row.chosen_ids[: row.prompt_length], row.chosen_ids[row.prompt_length :], row.rejected_ids[row.prompt_length :]
    )  # fmt: skip
    return tokenizer().decode(prompt), tokenizer().decode(chosen), tokenizer().decode(rejected)


CHAT = ("<|system|>S<|end|>\n<|user|>Q<|end|>\n<|assistant|>", "yes<|end|>")
ASKED = ("<|user|>Q<|end|>\n<|assistant|>", "yes<|end|>")

SUPERVISED: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "prompt-completion": ({"prompt": "Q:", "completion": " yes"}, ("Q:", " yes<|end|>")),
    "language modelling": ({"text": "The sky."}, ("T", "he sky.<|end|>")),
    "chat": ({"messages": [SYSTEM, USER, GOOD]}, CHAT),
    "chat with a message after the reply": ({"messages": [SYSTEM, USER, GOOD, USER]}, CHAT),
    "chat of several turns": (
        {"messages": [USER, BAD, USER, GOOD]},
        ("<|user|>Q<|end|>\n<|assistant|>no<|end|>\n<|user|>Q<|end|>\n<|assistant|>", "yes<|end|>"),
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "yes"}]}, ASKED),
    "chat prompt-completion": ({"prompt": [SYSTEM, USER], "completion": [GOOD]}, CHAT),
    "completion that repeats the prompt": ({"prompt": [SYSTEM, USER], "completion": [SYSTEM, USER, GOOD]}, CHAT),
    "chat prompt and text": ({"prompt": [SYSTEM, USER], "completion": "yes"}, CHAT),
    "text prompt and chat": ({"prompt": "Q", "completion": [GOOD]}, ASKED),
    "text prompt and whole chat": ({"prompt": "Q", "completion": [USER, GOOD]}, ASKED),
    "completion of several turns": (
        {"prompt": [USER], "completion": [GOOD, USER, BAD]},
        (ASKED[0], "yes<|end|>\n<|user|>Q<|end|>\n<|assistant|>no<|end|>"),
    ),
    "unpaired preference": ({"prompt": "Q:", "completion": " yes", "label": True}, ("Q:", " yes<|end|>")),
    "another label": ({"prompt": "Q:", "completion": " yes", "label": "math"}, ("Q:", " yes<|end|>")),
    "messages as JSON text": (
        {"messages": json.dumps([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])},
        ("<|user|>Q<|end|>\n<|assistant|>", "A<|end|>"),
    ),
    "null columns": ({"prompt": "Q:", "completion": " yes", "label": None, "tools": None}, ("Q:", " yes<|end|>")),
}


@pytest.mark.parametrize("form", SUPERVISED)
def test_supervised_forms(tmp_path: Path, form: str) -> None:
    row, expected = SUPERVISED[form]
    rows = supervised(tmp_path, row, row)
    assert parts(rows) == parts(rows, 1) == expected


PAIRS: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "preference": (
        {"prompt": "Q:", "chosen": " yes", "rejected": " no"},
        ("Q:", " yes<|end|>", " no<|end|>"),
    ),
    "implicit prompt": ({"chosen": "Q: yes", "rejected": "Q: no"}, ("Q: ", "yes<|end|>", "no<|end|>")),
    "chat": ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, (*CHAT, "no<|end|>")),
    "chat with implicit prompt": (
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        (*CHAT, "no<|end|>"),
    ),
    "text prompt and whole chats": (
        {"prompt": "Q", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        (*CHAT, "no<|end|>"),
    ),
    "chats that repeat the prompt": (
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        (*CHAT, "no<|end|>"),
    ),
    "text prompt and replies": ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, (*ASKED, "no<|end|>")),
    "chat prompt and texts": ({"prompt": [USER], "chosen": "yes", "rejected": "no"}, (*ASKED, "no<|end|>")),
    "null prompt": (
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        (*ASKED, "no<|end|>"),
    ),
}


@pytest.mark.parametrize("form", PAIRS)
def test_preference_forms(tmp_path: Path, form: str) -> None:
    row, expected = PAIRS[form]
    assert sides(pairs(tmp_path, row)) == expected


def test_equal_chats_are_left_out_like_equal_texts(tmp_path: Path) -> None:
    equal = {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}
    rows = pairs(tmp_path, equal, PAIRS["chat"][0], PAIRS["chat with implicit prompt"][0], equal)
    assert len(rows) == 2
    assert rows.notes[-1].endswith("2 of 4 pairs left out: 2 whose sides are equal")


def test_the_prompt_of_a_row_is_the_prompt_of_sampling(tmp_path: Path) -> None:
    row = supervised(tmp_path, {"messages": [SYSTEM, USER, GOOD]}).row(0)
    question = (Message(role="system", content="S"), Message(role="user", content="Q"))
    prompt = encode_prompt(tokenizer(), question)
    assert row.token_ids[: len(prompt)].tolist() == prompt
    assert row.loss_mask.tolist().index(True) == len(prompt)
    one_turn = supervised(tmp_path, {"messages": [USER, GOOD]}).row(0)
    assert one_turn.token_ids[: one_turn.loss_mask.tolist().index(True)].tolist() == encode_prompt(tokenizer(), "Q")


def test_a_reply_that_the_template_changes_is_the_content_of_the_message(tmp_path: Path) -> None:
    # The prompt ends with <think> only before the reply is there, and the template leaves the reasoning out.
    reply = {"role": "assistant", "content": "why</think>yes"}
    encoder = tokenizer(REASONING)
    rows = supervised(tmp_path, {"messages": [USER, reply]}, encoder=encoder)
    assert parts(rows, encoder=encoder) == ("<|user|>Q<|end|><|assistant|><think>", "why</think>yes<|end|>")
    message = r"column.*|row 1: expected a reply of one message: the chat template renders the prompt otherwise"
    with pytest.raises(DataError, match=message):
        supervised(tmp_path, {"prompt": [USER], "completion": [reply, USER, reply]}, encoder=encoder)


def test_a_turn_may_end_with_another_token_than_the_end_token(tmp_path: Path) -> None:
    encoder = tokenizer(end="<eos>")
    chat = {"messages": [USER, GOOD]}
    assert parts(supervised(tmp_path, chat, encoder=encoder), encoder=encoder)[1] == "yes<|end|>\n<eos>"
    turn_end = frozenset([encoder.convert_tokens_to_ids("<|end|>")])
    assert parts(supervised(tmp_path, chat, encoder=encoder, ends=turn_end), encoder=encoder)[1] == "yes<|end|>"


def test_a_whole_text_begins_like_every_text_of_the_tokenizer(tmp_path: Path) -> None:
    encoder = tokenizer(begins=True)
    for text in ("The sky.", "<s>The sky."):
        assert parts(supervised(tmp_path, {"text": text}, encoder=encoder), encoder=encoder) == (
            "<s>", "The sky.<|end|>",
        )  # fmt: skip
    # Prompts of text are rendered already, and a template writes its own beginning.
    assert parts(supervised(tmp_path, {"prompt": "Q", "completion": "A"}, encoder=encoder), encoder=encoder)[0] == "Q"


def test_completions_with_the_label_false_are_not_trained(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "completion": text, "label": text == "yes"} for text in ("no", "yes", "never")]
    read = supervised(tmp_path, *rows)
    assert len(read) == 1 and parts(read) == ("Q", "yes<|end|>")
    assert read.notes[-1].endswith("rows.jsonl: 2 rows left out: their label is false")
    with pytest.raises(DataError, match="expected a row to train, found none: the label of every row is false"):
        supervised(tmp_path, rows[0])


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,label\nQ,"yes, 007",True\nQ,no,False\n')
    rows = reader().supervised(str(path), "sft.path")
    assert len(rows) == 1 and parts(rows) == ("Q", "yes, 007<|end|>")
    path.write_text("chosen,rejected\nQ: yes,Q: no\n")
    assert sides(reader().pairs(str(path), "preference.path")) == PAIRS["implicit prompt"][1]


REFUSED = {
    "preference rows in sft": ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "found preference rows: prompt"),
    "prompt-only rows": ("sft", {"prompt": [USER]}, "found prompt-only rows: prompt"),
    "stepwise supervision": (
        "sft", {"prompt": "a", "completions": ["b"], "labels": [True]}, "found stepwise supervision rows: prompt",
    ),
    "verl": ("sft", {"prompt": [USER], "reward_model": {"ground_truth": "1"}}, "found verl rows"),
    "unpaired": ("preference", {"prompt": "a", "completion": "b", "label": True}, "found unpaired preference rows"),
    "chat": ("preference", {"messages": [USER, GOOD]}, "found language modelling rows: messages"),
    "instruction": ("sft", {"instruction": "a", "input": "", "output": "b"}, "found instruction rows: instr"),
    "other": ("preference", {"x": 1}, "expected the columns .* chosen \\+ rejected; found x$"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_by_name(tmp_path: Path, name: str) -> None:
    stage, row, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        (supervised if stage == "sft" else pairs)(tmp_path, row)
    assert "\n" not in caught.value.message


BAD_ROWS = {
    "no reply": ({"messages": [USER]}, "column messages: expected a message of the assistant, found none"),
    "no prompt": ({"messages": [GOOD]}, "column messages: expected a message to reply to, found none"),
    "empty reply": (
        {"messages": [USER, {"role": "assistant", "content": " "}]}, "column messages: expected text of the assistant",
    ),
    "no messages": ({"messages": "Q"}, "column messages: expected a list of messages, found str 'Q'"),
    "tools": ({"messages": [USER, GOOD], "tools": [{"name": "x"}]}, "column tools: expected none"),
    "calls": ({"messages": [USER, {**GOOD, "tool_calls": [1]}]}, "column messages: message 2: expected role and"),
    "reply of the user": ({"prompt": [USER], "completion": [USER]}, "column completion: expected text of the ass"),
    "prompt of the assistant": ({"prompt": [GOOD], "completion": [GOOD]}, "column prompt: expected a last message of"),
    "blank text": ({"text": " "}, "column text: expected text, found ' '"),
    "no difference before a question": (
        {"chosen": [USER, GOOD], "rejected": [SYSTEM, GOOD]}, "columns chosen and rejected: expected a common beg",
    ),
    "nothing in common": ({"chosen": "a", "rejected": "b"}, "columns chosen and rejected: expected a common beg"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_used_are_left_out_up_to_a_share(tmp_path: Path, name: str) -> None:
    row, message = BAD_ROWS[name]
    read = reader().pairs if "chosen" in row else reader().supervised
    columns = {"messages": [USER, GOOD], "prompt": [USER], "completion": [GOOD], "text": "abc"}
    good = {name: columns[name] for name in row if name in columns}
    if "chosen" in row:
        good = {"chosen": "Q: yes", "rejected": "Q: no"}
    path = write(tmp_path, good, row, good)
    with pytest.raises(DataError) as caught:
        read(path, "x.path", 0.3)
    assert f"x.path {path}: 1 of 3 rows are unusable, more than " in caught.value.message
    assert "the first: row 2, column" in caught.value.message and message in caught.value.message
    rows = read(path, "x.path", 0.34)
    assert len(rows) == 2
    assert rows.notes[0].startswith(f"x.path {path}: 1 of 3 rows left out, the first: row 2")


def test_a_template_that_refuses_a_conversation_makes_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [USER, GOOD]}, {"messages": [SYSTEM, USER, GOOD]})
    strict = reader(tokenizer(NO_SYSTEM))
    assert len(strict.supervised(path, "sft.path", 0.5)) == 1
    with pytest.raises(
        DataError, match="row 2, column messages: the chat template cannot render the conversation: .*no system"
    ):
        strict.supervised(path, "sft.path")
    with pytest.raises(DataError, match="expected a chat template in the tokenizer"):
        reader(tokenizer(None)).supervised(path, "sft.path", 0.5)
    with pytest.raises(ConfigError, match="cannot render the conversation: .*no system"):
        encode_prompt(tokenizer(NO_SYSTEM), (Message(role="system", content="S"), Message(role="user", content="Q")))


@pytest.mark.parametrize("chat", [True, False])
def test_rows_that_are_too_long_are_left_out(tmp_path: Path, chat: bool) -> None:
    def row(length: int) -> dict[str, Any]:
        content = "x" * length
        return {"messages": [USER, {**GOOD, "content": content}]} if chat else {"prompt": "Q", "completion": content}

    # Tokens before the text and at its end: 5 + 1 of the template, or 1 + 1.
    fits = 20 - (6 if chat else 2)
    path = write(tmp_path, row(fits), row(fits + 1), row(fits))
    small = reader(longest=20)
    rows = small.supervised(path, "sft.path", 0.4)
    assert rows.token_ids.lengths.tolist() == [20, 20]
    assert "1 of 3 rows left out, the first: row 2, column" in rows.notes[0]
    assert "21 tokens with the prompt, actors.max_model_len is 20" in rows.notes[0]
    with pytest.raises(DataError, match=r"1 of 3 rows are unusable, more than sft\.max_bad_rows 0\.1; mend or remove"):
        small.supervised(path, "sft.path", 0.1)


@pytest.mark.parametrize(("wanted", "unwanted"), [(True, False), (1, 0), (1.0, 0.0), ("1", "0"), ("True", "false")])
def test_a_completion_whose_label_is_false_in_any_form_is_left_out(wanted: Any, unwanted: Any, tmp_path: Path) -> None:
    row = {"prompt": "Q:", "completion": " yes"}
    rows = supervised(tmp_path, {**row, "label": wanted}, {**row, "label": unwanted})
    assert len(rows) == 1
    assert rows.notes[-1].endswith("1 rows left out: their label is false")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q:", "completion": "A", "label": 2}, "column label: expected true or false, found int '2'"),
        (
            {"messages": str([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])},
            "column messages: expected messages as JSON, found the text of a Python list",
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "f"},
                               {"from": "gpt", "value": "A"}]},
            "column conversations: message 2: expected role and content, found function_call, which is not read",
        ),
        ({"prompt": "Q:", "completion": "A", "images": [{"path": "a"}]}, "column images: expected none, found images"),
    ],
)  # fmt: skip
def test_rows_that_would_lose_something_are_unusable(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"1 of 1 rows are unusable.*{message}"):
        supervised(tmp_path, row)


@pytest.mark.parametrize(
    ("values", "bare"),
    [
        ({"prompt": "Q:", "completion": " yes"}, True),
        ({"text": "Q: yes"}, True),
        ({"prompt": "<|user|>Q<|end|>\n<|assistant|>", "completion": "yes"}, False),
        ({"prompt": "<|user|>Q<|end|>\n<|assistant|>1+1", "completion": "=2"}, False),  # goes on after a thought
        ({"text": "<|user|>Q<|end|>\n<|assistant|>yes"}, False),
        ({"messages": [USER, GOOD]}, False),
        ({"prompt": "Q", "completion": [GOOD]}, False),
    ],
)
def test_plain_text_without_the_chat_template_is_noted(tmp_path: Path, values: dict[str, Any], bare: bool) -> None:
    notes = supervised(tmp_path, values).notes
    assert len(notes) == bare
    if bare:
        assert "rows.jsonl: 1 of 1 rows are plain text" in notes[0] and r"lack '<|end|>\n<|assistant|>'" in notes[0]


def test_plain_pairs_without_the_chat_template_are_noted(tmp_path: Path) -> None:
    pair = {"prompt": "Q:", "chosen": "yes", "rejected": "no"}
    rendered = {**pair, "prompt": "<|user|>Q<|end|>\n<|assistant|>"}
    [note] = pairs(tmp_path, pair, rendered).notes
    assert "1 of 2 rows are plain text" in note
    assert pairs(tmp_path, rendered).notes == ()
    assert pairs(tmp_path, pair, encoder=tokenizer(None)).notes == ()  # no template, so nothing lacks
