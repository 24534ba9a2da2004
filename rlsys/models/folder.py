"""The initial model of a run, as a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlsys.config.engine_roles import ModelEngines, engine_settings, given_models
from rlsys.config.schema import Config, FromScratchConfig
from rlsys.directory import RunDirectory
from rlsys.errors import ConfigError
from rlsys.models.scratch import build_from_scratch, load_tokenizer, tensor_header
from rlsys.trees import Role

WEIGHT_PATTERNS = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.md")


def initial_model_folder(config: Config, run_dir: Path, vocabulary: Callable[[], Sequence[str]]) -> Path:
    """The folder of the initial policy: built in the run directory, local, or downloaded from the hub.

    Args:
        vocabulary: returns the strings that become single tokens of a model from scratch.
    Raises:
        ConfigError: model.path is neither a model folder nor a hub id that can be fetched.
    """
    scratch = config.model.from_scratch
    if scratch is not None:
        folder = RunDirectory(run_dir).model
        entries = vocabulary()
        built = _digest([scratch.model_dump(), entries, config.run.seed])
        record = RunDirectory(run_dir).model_digest  # of what it was built from: the config may have changed since
        if not record.exists() or record.read_text() != built:
            unfinished = run_dir / ".model"
            shutil.rmtree(unfinished, ignore_errors=True)
            _build(scratch, entries, config.run.seed, unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
            record.write_text(built)
        return folder
    return model_folder(str(config.model.path), "model.path")


def _build(scratch: FromScratchConfig, vocabulary: Sequence[str], seed: int, folder: Path) -> None:
    """`build_from_scratch`, whose libraries say in three ways that a disk is full."""
    try:
        build_from_scratch(scratch, vocabulary, seed, folder)
    except Exception as error:
        if type(error) is Exception or isinstance(error, OSError | SafetensorError):  # tokenizers raises the first
            raise ConfigError(
                f"run.dir: the model of model.from_scratch cannot be written to {folder}: {error}; free disk space, or "
                "choose another run.dir"
            ) from error
        raise


def model_folder(name: str, field: str) -> Path:
    """The folder of a model given as a folder or hub id, downloaded where it must be.

    Args:
        field: the config field that names the model.
    Raises:
        ConfigError: it is neither a model folder nor a hub id that can be fetched.
    """
    path = Path(name)
    folder = path.absolute() if path.is_dir() else _from_hub(name, field)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{field} {name}: the folder has no config.json, so it is no model")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{field} {name}: no *.safetensors; other weight formats are not read")
    load_tokenizer(folder, field)
    return folder


def search_engines(config: Config) -> dict[Role, ModelEngines]:
    """The engines of search.model and search.reviewer, where they are given, with their folders.

    Raises:
        ConfigError: see `model_folder`; an engine over several devices on CPUs.
    """
    return {
        writer: ModelEngines(
            writer=writer,
            path=model_folder(model.path, f"search.{writer}.path"),
            actors=engine_settings(config, writer, model),
        )
        for writer, model in given_models(config).items()
    }


def tokenizer_files(model: Path) -> list[Path]:
    """The files of a model folder that belong beside every saved policy: tokenizer, template, generation config."""
    skipped = {path for pattern in WEIGHT_PATTERNS for path in model.glob(pattern)} | {model / "config.json"}
    return sorted(path for path in model.iterdir() if path.is_file() and path not in skipped)


def model_digest(folder: Path) -> str:
    """sha256 of what a model is: its config.json, its tensors' names, shapes and formats, and samples of their values.

    The samples are the first and last MiB of every file, at no cost for large ones: enough to tell models apart that
    were downloaded or built apart. Weights that differ between the samples alone have the same digest; where that
    matters, `weights_digest` reads all of them.
    """
    parts: list[Any] = [json.loads((folder / "config.json").read_text(encoding="utf-8"))]
    for path in sorted(folder.glob("*.safetensors")):
        header = tensor_header(path)
        tensors = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}
        with path.open("rb") as file:
            first = hashlib.sha256(file.read(2**20)).hexdigest()
            file.seek(max(0, path.stat().st_size - 2**20))
            parts.append([tensors, first, hashlib.sha256(file.read()).hexdigest()])
    return _digest(parts)


def weights_digest(folder: Path) -> str:
    """sha256 of a policy, every byte of its weights: config.json, and the names and contents of the safetensors files.

    It takes as long as reading the files, about a second for every GB.
    """
    parts: list[Any] = [json.loads((folder / "config.json").read_text(encoding="utf-8"))]
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            parts.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return _digest(parts)


def _from_hub(name: str, field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{field} {name}: neither a folder here nor a model that the hub gave ({reason})") from None


def _digest(values: Any) -> str:
    """sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
