"""Model folders: digests, size, files, and the errors of folders that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rlsys.config.files import parse_config
from rlsys.config.schema import Config, FromScratchConfig
from rlsys.data.inputs import prepare_model
from rlsys.errors import ConfigError
from rlsys.models import folder as folders
from rlsys.models import scratch
from rlsys.models.folder import ModelFolder, load_tokenizer, weights_digest

TINY = {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16, "max_positions": 256}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"
SIZES = FromScratchConfig.model_validate(TINY)


def config(model: dict[str, Any], seed: int = 0) -> Config:
    values = {"run": {"dir": "unused", "seed": seed}, "model": model, "task": {"type": "letter_count"}}
    return parse_config(values, "test")


def build(model: dict[str, Any], run_dir: Path, seed: int = 0) -> Path:
    return prepare_model(config(model, seed), run_dir).path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build({"from_scratch": TINY}, tmp_path_factory.mktemp("run"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_model_from_scratch_is_built_once(built: Path) -> None:
    assert built.name == "model"
    before = (built / "model.safetensors").stat().st_mtime_ns
    assert build({"from_scratch": TINY}, built.parent) == built
    assert (built / "model.safetensors").stat().st_mtime_ns == before


def test_it_is_built_again_if_the_config_changed(tmp_path: Path, built: Path) -> None:
    # A run that ended before its first checkpoint may start again with another config.
    folder = build({"from_scratch": TINY}, tmp_path)
    assert weights(folder) == weights(built)
    assert weights(build({"from_scratch": TINY}, tmp_path, seed=1)) != weights(built)
    wider = {"from_scratch": {**TINY, "hidden_size": 64}}
    assert len(weights(build(wider, tmp_path))) > len(weights(built))


def digest(folder: Path) -> str:
    return ModelFolder(folder).digest


def test_the_digest_covers_config_and_tensors(tmp_path: Path, built: Path) -> None:
    same = build({"from_scratch": TINY}, tmp_path / "a")
    assert digest(same) == digest(built)
    other_seed = build({"from_scratch": TINY}, tmp_path / "b", seed=1)
    assert digest(other_seed) != digest(built)  # same shapes, other values
    (same / "config.json").write_text((built / "config.json").read_text().replace("100.0", "200.0"))
    assert digest(same) != digest(built)


def middle_changed(path: Path, byte: int) -> None:
    """Write a safetensors file of 3 MiB whose middle byte has the given value."""
    values = np.zeros(3 * 2**20, dtype=np.uint8)
    values[len(values) // 2] = byte
    save_file({"weight": values}, path)


def test_the_digest_of_weights_covers_every_byte(tmp_path: Path, built: Path) -> None:
    model_folders = [tmp_path / name for name in ("a", "b", "same")]
    for folder, byte in zip(model_folders, (0, 1, 0), strict=True):
        folder.mkdir()
        shutil.copy(built / "config.json", folder)
        middle_changed(folder / "model.safetensors", byte)
    first, second, same = map(weights_digest, model_folders)
    assert first == same != second
    assert len(set(map(digest, model_folders))) == 1  # its samples do not reach the middle
    (model_folders[2] / "model.safetensors").rename(model_folders[2] / "other.safetensors")
    assert weights_digest(model_folders[2]) != first
    (model_folders[0] / "config.json").write_text((built / "config.json").read_text().replace("100.0", "200.0"))
    assert weights_digest(model_folders[0]) != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"model\.safetensors is not a complete safetensors file; download it again"),
        (LFS_POINTER, r"model\.safetensors: expected a safetensors file, found a Git LFS pointer; run git lfs pull"),
    ],
)
def test_a_file_without_weights_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        _ = ModelFolder(tmp_path).parameters


def test_weights_cut_short_are_named(tmp_path: Path, built: Path) -> None:
    whole = (built / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="not a complete safetensors file"):
        _ = ModelFolder(tmp_path).parameters


def test_a_build_that_was_cut_short_is_not_used(tmp_path: Path, built: Path) -> None:
    (tmp_path / ".model").mkdir()
    (tmp_path / ".model" / "model.safetensors").write_bytes(b"half")
    assert weights(build({"from_scratch": TINY}, tmp_path)) == weights(built)
    assert not (tmp_path / ".model").exists()


def test_a_local_folder_is_used_where_it_is(built: Path, tmp_path: Path) -> None:
    assert build({"path": str(built)}, tmp_path) == built
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_or_with_other_weights(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path .* no config\.json"):
        prepare_model(config({"path": str(tmp_path)}), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"expected \*\.safetensors, found none"):
        prepare_model(config({"path": str(tmp_path)}), tmp_path)


def test_a_folder_without_a_tokenizer(built: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((built / name).read_bytes())
    with pytest.raises(ConfigError, match=r"model\.path .* tokenizer"):
        prepare_model(config({"path": str(tmp_path)}), tmp_path)


def test_a_name_that_is_neither_here_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, fault in (("nobody/no-such-model", "neither a folder here"), ("not/a/valid/name", "no such folder")):
        with pytest.raises(ConfigError, match=rf"model\.path {name}: {fault}") as caught:
            build({"path": name}, tmp_path)
        assert "\n" not in caught.value.message


def test_tokenizer_files_are_all_files_but_weights_and_config(tmp_path: Path) -> None:
    expected = [
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    dropped = ["config.json", "README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
               "pytorch_model.bin", "pytorch_model.bin.index.json"]  # fmt: skip
    for name in (*expected, *dropped):
        (tmp_path / name).write_text("{}")
    (tmp_path / "original").mkdir()
    assert [path.name for path in ModelFolder(tmp_path).tokenizer_files] == expected


def test_the_tokenizer_of_a_built_model_is_among_them(built: Path) -> None:
    names = {path.name for path in ModelFolder(built).tokenizer_files}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert not names & {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "error", [Exception("No space left"), OSError(28, "No space left"), SafetensorError("No space")]
)
def test_a_full_disk_while_a_model_is_built_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(scratch, "build_from_scratch", full)
    with pytest.raises(ConfigError, match=r"^run.dir: the model of model.from_scratch cannot be written .*No space"):
        build({"from_scratch": TINY}, tmp_path)


def test_other_errors_of_building_a_model_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(scratch, "build_from_scratch", broken)
    with pytest.raises(ZeroDivisionError):
        build({"from_scratch": TINY}, tmp_path)


def test_a_tokenizer_is_loaded_once(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    def load(path: Path, field: str) -> Any:
        loaded.append(path)
        return load_tokenizer(path, field)

    monkeypatch.setattr(folders, "load_tokenizer", load)
    model = folders.given_model(str(built), "model.path")
    assert model.end_token_ids == [model.tokenizer.eos_token_id]
    assert len(model.tokenizer_digest) == 64
    assert loaded == [built]


def tokenizer_digest(folder: Path) -> str:
    return ModelFolder(folder).tokenizer_digest


def test_the_tokenizer_digest_covers_vocabulary_and_template(tmp_path: Path) -> None:
    scratch.build_from_scratch(SIZES, ("a", "in"), 0, tmp_path / "first")
    first = tokenizer_digest(tmp_path / "first")
    scratch.build_from_scratch(SIZES, ("a", "in"), 9, tmp_path / "weights")
    assert tokenizer_digest(tmp_path / "weights") == first
    scratch.build_from_scratch(SIZES, ("xyz",), 0, tmp_path / "vocabulary")
    assert tokenizer_digest(tmp_path / "vocabulary") != first
    (tmp_path / "weights" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert tokenizer_digest(tmp_path / "weights") != first


def test_missing_models_name_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match=r"model.path .*no tokenizer files"):
        load_tokenizer(tmp_path)


DAMAGES: dict[str, tuple[str, bytes, str]] = {
    "tokenizer cut short": (
        "tokenizer.json",
        b'{"version": "1.',
        "tokenizer.json is not JSON: Unterminated .*download",
    ),
    "tokenizer a list": ("tokenizer.json", b"[]", "expected a JSON object in tokenizer.json, found list"),
    "tokenizer config a list": ("tokenizer_config.json", b"[]", "JSON object in tokenizer_config.json, found list"),
    "tokenizer in LFS": ("tokenizer.json", LFS_POINTER, "tokenizer.json is a Git LFS pointer; run git lfs pull"),
    "template in LFS": ("chat_template.jinja", LFS_POINTER, "chat_template.jinja is a Git LFS pointer"),
    "template not UTF-8": ("chat_template.jinja", b"\xff\xfe{{", "chat_template.jinja is not a text in UTF-8: .* 0xff"),
    "merges not UTF-8": ("merges.txt", b"a \xff", "merges.txt is not a text in UTF-8: .* save it as UTF-8"),
    "vocabulary damaged": ("vocab.json", b"{", "vocab.json is not JSON: .*download it again"),
    "special tokens damaged": ("special_tokens_map.json", b"[", "special_tokens_map.json is not JSON"),
    "config null": ("config.json", b"null", "expected a JSON object in config.json, found NoneType"),
    "config nested without end": ("config.json", b"[" * 100_000, "config.json is not JSON: .*recursion"),
    "config not UTF-8": ("config.json", b"\xff{}", "config.json is not JSON: 'utf-8' codec"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_of_config_or_tokenizer_is_named(case: str, built: Path, tmp_path: Path) -> None:
    name, content, message = DAMAGES[case]
    folder = Path(shutil.copytree(built, tmp_path / "model"))
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^model\.path .*{message}") as caught:
        folders.given_model(str(folder), "model.path")
    assert "\n" not in caught.value.message


# transformers reads config.json before the tokenizer, and its classes raise errors of many kinds.
UNUSABLE: dict[str, dict[str, Any]] = {
    "config.json": {"vocab_size": "360"},
    "model_type": {"model_type": ["qwen2"]},
    "num_hidden_layers": {"num_hidden_layers": -1},
    "rope_parameters": {"rope_parameters": [1]},
    "factor": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    r"dtype is 'float99', expected one of bfloat16, float16, float32 \(": {"dtype": "float99"},
    "to_dict": {"quantization_config": "gptq"},
}


@pytest.mark.parametrize("named", UNUSABLE)
def test_an_unusable_value_of_the_config_is_an_error_of_the_config(named: str, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **UNUSABLE[named]}))
    with pytest.raises(ConfigError, match=rf"^model\.path .*expected in config\.json a model .*{named}|{named}"):
        folders.given_model(str(folder), "model.path")


@pytest.mark.parametrize("token", [5, {"a": 1}])
def test_an_unusable_value_of_the_tokenizer_is_an_error_of_the_tokenizer(
    token: Any, built: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "model"))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "eos_token": token}))
    with pytest.raises(
        ConfigError, match=r"^model\.path .*: expected a model with its tokenizer: Special token eos_tok"
    ):
        folders.given_model(str(folder), "model.path")


def test_a_folder_that_is_no_whole_model_is_refused(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "model"))
    with pytest.raises(ConfigError, match="expected the folder of a model, found a file"):
        folders.given_model(str(folder / "config.json"), "model.path")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"found adapter_config.json of an adapter; merge the adapter"):
        folders.given_model(str(folder), "model.path")
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(ConfigError, match=r"expected \*\.safetensors, found none beside model\.gguf; other weight"):
        folders.given_model(str(folder), "model.path")


def test_a_run_directory_is_no_model_and_its_policies_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="expected a model folder, found a run directory; .*stages/online"):
        folders.given_model(str(tmp_path), "model.path")


def test_a_model_is_found_by_variable_and_in_the_cache_of_the_hub(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--owner--name"
    shutil.copytree(built, cached / "snapshots" / "0a1b")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b")
    monkeypatch.setenv("MODELS", str(tmp_path))
    assert folders.given_model("${MODELS}/models--owner--name", "model.path").path == cached / "snapshots" / "0a1b"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_of_a_model_folder_is_never_run(tmp_path: Path, name: str, nested: bool) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    scratch.build_from_scratch(SIZES, "ab", 0, folder)
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import Qwen2Config as C, Qwen2ForCausalLM as M, Qwen2Tokenizer as T\n"
    )
    values = json.loads((folder / name).read_text())
    where = values.setdefault("text_config", {}) if nested else values
    where["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"^search\.model\.path .*: {name} names Python code of its own"):
        load_tokenizer(folder, "search.model.path")
    assert not ran.exists()


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../model.safetensors", "/model.safetensors"])
def test_index_that_names_other_files_is_refused(tmp_path: Path, named: str) -> None:
    scratch.build_from_scratch(SIZES, "ab", 0, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}))
    load_tokenizer(tmp_path)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": named}}))
    with pytest.raises(ConfigError, match=rf"^model\.path .*index\.json names '{named}'; expected \*\.safetensors"):
        load_tokenizer(tmp_path)
