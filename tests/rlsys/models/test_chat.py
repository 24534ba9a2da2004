"""Text as token ids: what the tokenizer encodes can be decoded again."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config.schema import FromScratchConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.errors import ConfigError
from rlsys.models import chat
from rlsys.models.folder import ModelFolder
from rlsys.models.scratch import EOS, build_from_scratch
from rlsys.tasks.letter_count.task import LetterCountTask

UNKNOWN = "[UNK]"
TINY = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_positions=64)


@cache
def built(form: str) -> tuple[LetterCountTask, Any]:
    task = LetterCountTask(LetterCountConfig.model_validate({"form": form, "shares": {"reflection": 0.5}}), 0)
    folder = Path(mkdtemp())
    build_from_scratch(TINY, task.vocabulary(), 0, folder)
    return task, ModelFolder(folder).tokenizer


@pytest.mark.parametrize("form", ["simple", "words"])
@given(index=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_task_texts_survive_the_tokenizer(form: str, index: int) -> None:
    task, tokenizer = built(form)
    problem, chain = task.demonstration(index, random.Random(index))
    ids, own = chat.encode_demonstration(tokenizer, problem.question, chain)
    prompt_length = own.index(True)
    assert all(own[prompt_length:]) and len(own) == len(ids)
    assert tokenizer.decode(ids[:prompt_length]) == f"<user>{problem.question}<assistant>"
    assert tokenizer.decode(ids[prompt_length:], skip_special_tokens=True) == chain
    assert ids[-1] == chat.end_token_id(tokenizer) and ids.count(ids[-1]) == 1
    assert ids[:prompt_length] == chat.encode_prompt(tokenizer, problem.question)


def test_plain_encoding_without_a_chat_template(tmp_path: Path) -> None:
    build_from_scratch(TINY, "ab", 0, tmp_path)
    tokenizer = ModelFolder(tmp_path).tokenizer
    tokenizer.chat_template = None
    assert chat.encode_prompt(tokenizer, "ab") == tokenizer("ab")["input_ids"]
    assert chat.encode_demonstration(tokenizer, "ab", "b")[1] == [False, False, True, True]


@pytest.mark.parametrize(("named", "expected"), [(None, [1]), (7, [1, 7]), ([7, 1, 9], [1, 7, 9])])
def test_end_tokens_are_those_of_tokenizer_and_generation_config(tmp_path: Path, named: Any, expected: Any) -> None:
    build_from_scratch(TINY, "ab", 0, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert chat.end_token_ids(ModelFolder(tmp_path).tokenizer, tmp_path) == expected


@pytest.mark.parametrize(
    "question",
    ["How many?", "  spaces \n around  ", "x\u00b2 + 1 = 0", "\u6570\u5b57", "?!", "", "ÄÖ <user> tags", "a" * 40],
)
def test_every_question_is_found_in_its_prompt(question: str) -> None:
    _, tokenizer = built("simple")
    encoder = chat.CheckedEncoder(tokenizer, len(tokenizer))
    assert encoder.prompt(question) == chat.encode_prompt(tokenizer, question)


def test_a_tokenizer_that_changes_texts_is_compared_with_its_own_form() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({EOS: 0, UNKNOWN: 1, "cafe": 2, "user": 3}, unk_token=UNKNOWN))
    words.normalizer = normalizers.BertNormalizer()  # drops accents and case
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS, unk_token=UNKNOWN)
    tokenizer.chat_template = "user {{ messages[0].content }}"
    encoder = chat.CheckedEncoder(tokenizer, 4)
    assert encoder.prompt("Café unknown") == [3, 2, 1]
    tokenizer.chat_template = "user {{ messages[0].content[:2] }}"
    with pytest.raises(ConfigError, match="expected the question in its prompt"):
        encoder.prompt("Café unknown")
