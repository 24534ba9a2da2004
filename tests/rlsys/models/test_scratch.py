"""Tiny models from scratch: their bytes, their tokenizer, and their size before they are built."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config.schema import FromScratchConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.models import scratch
from rlsys.models.chat import encode_prompt
from rlsys.models.folder import ModelFolder
from rlsys.tasks import tags
from rlsys.tasks.letter_count.task import LetterCountTask

TINY = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_positions=64)


def make_task(form: str) -> LetterCountTask:
    return LetterCountTask(LetterCountConfig.model_validate({"form": form, "shares": {"reflection": 0.5}}), 0)


@cache
def built(form: str) -> tuple[LetterCountTask, Path, Any]:
    task, folder = make_task(form), Path(mkdtemp())
    scratch.build_from_scratch(TINY, task.vocabulary(), 0, folder)
    return task, folder, ModelFolder(folder).tokenizer


def file_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_same_seed_same_bytes_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    import torch

    _, first, _ = built("simple")
    torch.manual_seed(123)
    expected = torch.rand(1).item()
    torch.manual_seed(123)
    scratch.build_from_scratch(TINY, make_task("simple").vocabulary(), 0, tmp_path / "again")
    assert torch.rand(1).item() == expected
    assert file_hashes(first) == file_hashes(tmp_path / "again")
    scratch.build_from_scratch(TINY, make_task("simple").vocabulary(), 1, tmp_path / "other")
    differ = file_hashes(tmp_path / "other").items() - file_hashes(first).items()
    assert {name for name, _ in differ} == {"model.safetensors"}


def test_the_folder_is_a_hugging_face_model() -> None:
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    _, folder, tokenizer = built("simple")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, Qwen2ForCausalLM)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 1, 1)
    assert (config.num_key_value_heads, config.vocab_size) == (1, len(tokenizer))
    assert config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_untied_embeddings(tmp_path: Path) -> None:
    from safetensors import safe_open

    scratch.build_from_scratch(TINY.model_copy(update={"tie_embeddings": False}), "ab", 0, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as untied:
        assert "lm_head.weight" in untied.keys()  # noqa: SIM118 - a safetensors file, not a dict
    with safe_open(built("simple")[1] / "model.safetensors", "pt") as tied:
        assert "lm_head.weight" not in tied.keys()  # noqa: SIM118


@given(text=st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), max_size=40))
@settings(max_examples=60, deadline=None)
def test_text_outside_the_vocabulary_survives_as_bytes(text: str) -> None:
    _, _, tokenizer = built("simple")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.decode(tokenizer("é 好", add_special_tokens=False)["input_ids"]) == "é 好"


def test_tags_and_question_pieces_are_single_tokens() -> None:
    _, _, tokenizer = built("words")
    for tag in tags.tag_strings():
        assert len(tokenizer(tag)["input_ids"]) == 1
    # <user>, 3 pieces, " and" and the question mark among them, " g", " n", 9 letters, <assistant>: 17 tokens.
    assert len(encode_prompt(tokenizer, "How many g and n are there in total in navigants?")) == 17


def test_longer_entries_win_and_words_match_as_wholes(tmp_path: Path) -> None:
    scratch.build_from_scratch(TINY, ("in", "<in", "<inn>", "a"), 0, tmp_path)
    tokenizer = ModelFolder(tmp_path).tokenizer

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]

    assert pieces("<inn>") == ["<inn>"]
    assert pieces("a in bin, in.") == ["a", " ", "in", " ", "b", "i", "n", ",", " ", "in", "."]


def test_importing_the_module_is_light() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'vllm', 'deepspeed'}"
    code = f"import sys, rlsys.models.scratch, rlsys.tasks.letter_count.task; print({heavy} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("form", ["simple", "words"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_an_unbuilt_model_has_the_tokenizer_and_the_size_of_the_built_one(
    tmp_path: Path, form: str, tie_embeddings: bool
) -> None:
    sizes = FromScratchConfig(
        hidden_size=96, layers=2, heads=3, intermediate_size=80, max_positions=64, tie_embeddings=tie_embeddings
    )
    vocabulary = make_task(form).vocabulary()
    unbuilt = scratch.UnbuiltModel(sizes, vocabulary, tmp_path / "model")
    assert not unbuilt.path.exists()
    scratch.build_from_scratch(sizes, vocabulary, 0, tmp_path / "model")
    built_model = ModelFolder(tmp_path / "model")
    assert unbuilt.tokenizer_digest == built_model.tokenizer_digest
    assert unbuilt.end_token_ids == built_model.end_token_ids
    assert unbuilt.parameters == built_model.parameters
