from __future__ import annotations

import hashlib
import json
import random
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
from rlsys.errors import ConfigError
from rlsys.models import scratch as models
from rlsys.tasks import tags
from rlsys.tasks.letter_count.task import LetterCountTask

TINY = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_positions=64)


def make_task(form: str) -> LetterCountTask:
    return LetterCountTask(LetterCountConfig.model_validate({"form": form, "shares": {"reflection": 0.5}}), 0)


@cache
def built(form: str) -> tuple[LetterCountTask, Path, Any]:
    task, folder = make_task(form), Path(mkdtemp())
    models.build_from_scratch(TINY, task.vocabulary(), 0, folder)
    return task, folder, models.load_tokenizer(folder)


def file_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_same_seed_same_bytes_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    import torch

    _, first, _ = built("simple")
    torch.manual_seed(123)
    expected = torch.rand(1).item()
    torch.manual_seed(123)
    models.build_from_scratch(TINY, make_task("simple").vocabulary(), 0, tmp_path / "again")
    assert torch.rand(1).item() == expected
    assert file_hashes(first) == file_hashes(tmp_path / "again")
    models.build_from_scratch(TINY, make_task("simple").vocabulary(), 1, tmp_path / "other")
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

    models.build_from_scratch(TINY.model_copy(update={"tie_embeddings": False}), "ab", 0, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as untied:
        assert "lm_head.weight" in untied.keys()  # noqa: SIM118 - a safetensors file, not a dict
    with safe_open(built("simple")[1] / "model.safetensors", "pt") as tied:
        assert "lm_head.weight" not in tied.keys()  # noqa: SIM118


@pytest.mark.parametrize("form", ["simple", "words"])
@given(index=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_task_texts_survive_the_tokenizer(form: str, index: int) -> None:
    task, _, tokenizer = built(form)
    problem, chain = task.demonstration(index, random.Random(index))
    ids, prompt_length = models.encode_demonstration(tokenizer, problem.question, chain)
    assert tokenizer.decode(ids[:prompt_length]) == f"<user>{problem.question}<assistant>"
    assert tokenizer.decode(ids[prompt_length:], skip_special_tokens=True) == chain
    assert ids[-1] == models.end_token_id(tokenizer) and ids.count(ids[-1]) == 1
    assert ids[:prompt_length] == models.encode_prompt(tokenizer, problem.question)


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
    assert len(models.encode_prompt(tokenizer, "How many g and n are there in total in navigants?")) == 17


def test_longer_entries_win_and_words_match_as_wholes(tmp_path: Path) -> None:
    models.build_from_scratch(TINY, ("in", "<in", "<inn>", "a"), 0, tmp_path)
    tokenizer = models.load_tokenizer(tmp_path)

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]

    assert pieces("<inn>") == ["<inn>"]
    assert pieces("a in bin, in.") == ["a", " ", "in", " ", "b", "i", "n", ",", " ", "in", "."]


def test_plain_encoding_without_a_chat_template(tmp_path: Path) -> None:
    models.build_from_scratch(TINY, "ab", 0, tmp_path)
    tokenizer = models.load_tokenizer(tmp_path)
    tokenizer.chat_template = None
    assert models.encode_prompt(tokenizer, "ab") == tokenizer("ab")["input_ids"]
    ids, prompt_length = models.encode_demonstration(tokenizer, "ab", "b")
    assert (len(ids), prompt_length) == (4, 2)


def test_digest_sees_vocabulary_and_template(tmp_path: Path) -> None:
    _, folder, _ = built("simple")
    first = models.tokenizer_digest(folder)
    models.build_from_scratch(TINY, make_task("simple").vocabulary(), 9, tmp_path / "weights")
    assert models.tokenizer_digest(tmp_path / "weights") == first
    models.build_from_scratch(TINY, ("xyz",), 0, tmp_path / "vocabulary")
    assert models.tokenizer_digest(tmp_path / "vocabulary") != first
    (tmp_path / "weights" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert models.tokenizer_digest(tmp_path / "weights") != first


def test_missing_models_name_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path .*nowhere"):
        models.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match=r"model.path .*no tokenizer files"):
        models.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_of_a_model_folder_is_never_run(tmp_path: Path, name: str, nested: bool) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    models.build_from_scratch(TINY, "ab", 0, folder)
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import Qwen2Config as C, Qwen2ForCausalLM as M, Qwen2Tokenizer as T\n"
    )
    values = json.loads((folder / name).read_text())
    where = values.setdefault("text_config", {}) if nested else values
    where["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"^search\.model\.path .*: {name} names Python code of its own"):
        models.load_tokenizer(folder, "search.model.path")
    assert not ran.exists()


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../model.safetensors", "/model.safetensors"])
def test_index_that_names_other_files_is_refused(tmp_path: Path, named: str) -> None:
    models.build_from_scratch(TINY, "ab", 0, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}))
    models.load_tokenizer(tmp_path)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": named}}))
    with pytest.raises(ConfigError, match=rf"^model\.path .*index\.json names '{named}'; expected \*\.safetensors"):
        models.load_tokenizer(tmp_path)


def test_importing_the_module_is_light() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'vllm', 'deepspeed'}"
    code = f"import sys, rlsys.models.scratch, rlsys.tasks.letter_count.task; print({heavy} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
