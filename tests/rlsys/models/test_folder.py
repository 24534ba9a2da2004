"""The initial model: built once, or a folder that must hold what is needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.data.inputs import prepare_model
from rlsys.errors import ConfigError
from rlsys.launch.resources import parameter_count
from rlsys.models import folder as setup
from rlsys.models.folder import model_digest, tokenizer_files, weights_digest

TINY = {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16, "max_positions": 256}


def config(model: dict[str, Any], seed: int = 0) -> Config:
    values = {"run": {"dir": "unused", "seed": seed}, "model": model, "task": {"type": "letter_count"}}
    return parse_config(values, "test")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_model(config({"from_scratch": TINY}), tmp_path_factory.mktemp("run"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_model_from_scratch_is_built_once(built: Path) -> None:
    assert built.name == "model"
    before = (built / "model.safetensors").stat().st_mtime_ns
    assert prepare_model(config({"from_scratch": TINY}), built.parent) == built
    assert (built / "model.safetensors").stat().st_mtime_ns == before


def test_it_is_built_again_where_the_config_changed(tmp_path: Path, built: Path) -> None:
    # A run that ended before its first checkpoint may be started again with another config.
    folder = prepare_model(config({"from_scratch": TINY}), tmp_path)
    assert weights(folder) == weights(built)
    assert weights(prepare_model(config({"from_scratch": TINY}, seed=1), tmp_path)) != weights(built)
    wider = config({"from_scratch": {**TINY, "hidden_size": 64}})
    assert len(weights(prepare_model(wider, tmp_path))) > len(weights(built))


def test_the_digest_of_a_model_is_of_its_config_and_its_tensors(tmp_path: Path, built: Path) -> None:
    same = prepare_model(config({"from_scratch": TINY}), tmp_path / "a")
    assert model_digest(same) == model_digest(built)
    other_seed = prepare_model(config({"from_scratch": TINY}, seed=1), tmp_path / "b")
    assert model_digest(other_seed) != model_digest(built)  # same shapes, other values
    (same / "config.json").write_text((built / "config.json").read_text().replace("100.0", "200.0"))
    assert model_digest(same) != model_digest(built)


def middle_changed(path: Path, byte: int) -> None:
    """A safetensors file of 3 MiB in which a byte in the middle has a value."""
    values = np.zeros(3 * 2**20, dtype=np.uint8)
    values[len(values) // 2] = byte
    save_file({"weight": values}, path)


def test_the_digest_of_weights_is_of_all_of_them(tmp_path: Path, built: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "same")]
    for folder, byte in zip(folders, (0, 1, 0), strict=True):
        folder.mkdir()
        shutil.copy(built / "config.json", folder)
        middle_changed(folder / "model.safetensors", byte)
    first, second, same = map(weights_digest, folders)
    assert first == same != second
    assert len(set(map(model_digest, folders))) == 1  # its samples do not reach the middle
    (folders[2] / "model.safetensors").rename(folders[2] / "other.safetensors")
    assert weights_digest(folders[2]) != first
    (folders[0] / "config.json").write_text((built / "config.json").read_text().replace("100.0", "200.0"))
    assert weights_digest(folders[0]) != first


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"])
def test_weights_that_are_none_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors is no whole safetensors file"):
        parameter_count(tmp_path)


def test_weights_cut_short_are_named(tmp_path: Path, built: Path) -> None:
    whole = (built / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="no whole safetensors file"):
        parameter_count(tmp_path)


def test_a_build_that_was_cut_short_is_not_used(tmp_path: Path, built: Path) -> None:
    (tmp_path / ".model").mkdir()
    (tmp_path / ".model" / "model.safetensors").write_bytes(b"half")
    assert weights(prepare_model(config({"from_scratch": TINY}), tmp_path)) == weights(built)
    assert not (tmp_path / ".model").exists()


def test_a_local_folder_is_used_where_it_is(built: Path, tmp_path: Path) -> None:
    assert prepare_model(config({"path": str(built)}), tmp_path) == built
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_or_with_other_weights(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path .* no config\.json"):
        prepare_model(config({"path": str(tmp_path)}), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        prepare_model(config({"path": str(tmp_path)}), tmp_path)


def test_a_folder_without_a_tokenizer(built: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((built / name).read_bytes())
    with pytest.raises(ConfigError, match=r"model\.path .* tokenizer"):
        prepare_model(config({"path": str(tmp_path)}), tmp_path)


def test_a_name_that_is_neither_here_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "not/a/valid/name"):
        with pytest.raises(ConfigError, match=rf"model\.path {name}: neither a folder here") as caught:
            prepare_model(config({"path": name}), tmp_path)
        assert "\n" not in caught.value.message


def test_what_goes_beside_every_policy(tmp_path: Path) -> None:
    kept = ["added_tokens.json", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer.model"]
    dropped = ["config.json", "README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
               "pytorch_model.bin", "pytorch_model.bin.index.json"]  # fmt: skip
    for name in (*kept, *dropped):
        (tmp_path / name).write_text("{}")
    (tmp_path / "original").mkdir()
    assert [path.name for path in tokenizer_files(tmp_path)] == kept


def test_the_tokenizer_of_a_built_model_is_among_them(built: Path) -> None:
    names = {path.name for path in tokenizer_files(built)}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert not names & {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "error", [Exception("No space left"), OSError(28, "No space left"), SafetensorError("No space")]
)
def test_a_full_disk_under_a_model_that_is_built_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(setup, "build_from_scratch", full)
    with pytest.raises(ConfigError, match=r"^run.dir: the model of model.from_scratch cannot be written .*No space"):
        prepare_model(config({"from_scratch": TINY}), tmp_path)


def test_other_errors_of_building_a_model_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(setup, "build_from_scratch", broken)
    with pytest.raises(ZeroDivisionError):
        prepare_model(config({"from_scratch": TINY}), tmp_path)
