"""Model folders: tokenizer, digests and size, and the checks that make a folder safe to load."""

from __future__ import annotations

import hashlib
import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from rlsys.directory import RunDirectory
from rlsys.earlier_runs import is_local, origin
from rlsys.errors import ConfigError
from rlsys.files import is_lfs_pointer
from rlsys.models.chat import end_token_ids
from rlsys.models.config_faults import keys_at_fault
from rlsys.models.weight_files import SAMPLE_BYTES, loaded_tensors, tensor_header
from rlsys.tables.sources import expand, newest_snapshot

WEIGHT_PATTERNS = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.md")
JSON_FILES = (
    "config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json",
)  # fmt: skip
"""Files of a model folder that hold a JSON object."""
OTHER_FILES = ("merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja")
"""Other files of config and tokenizer."""


ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter of another model."""


class ModelFolder:
    """A model folder whose tokenizer, digests and size are each computed once, when they are first needed.

    Args:
        path: the folder, in Hugging Face format.
        field: the config field that names the model, for error messages.
    """

    def __init__(self, path: Path, field: str = "model.path") -> None:
        self.path = path
        self.field = field

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; see `load_tokenizer` for the errors."""
        return load_tokenizer(self.path, self.field)

    @cached_property
    def end_token_ids(self) -> list[int]:
        """All tokens that end a completion."""
        return end_token_ids(self.tokenizer, self.path)

    @cached_property
    def config(self) -> Any:
        """The config of transformers; see `load_config` for the errors."""
        return load_config(self.path, self.field)

    @cached_property
    def vocabulary(self) -> int | None:
        """Number of token ids that the model has; None if its kind is unknown to transformers."""
        try:
            return int(self.config.get_text_config().vocab_size)
        except (ConfigError, AttributeError, TypeError, ValueError):
            return None  # a model that is not trained may be one that only the engine knows

    @cached_property
    def tokenizer_digest(self) -> str:
        """sha256 of everything that decides the token ids of a text: tokenizer, chat template, eos and pad ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
        parts = {
            "tokenizer": backend.to_str() if backend else sorted(self.tokenizer.get_vocab().items()),
            "chat_template": self.tokenizer.chat_template,
            "eos": self.tokenizer.eos_token_id,
            "pad": self.tokenizer.pad_token_id,
        }
        return json_digest(parts)

    @cached_property
    def vocabulary_digest(self) -> str:
        """sha256 of the token that each id stands for."""
        return json_digest(sorted(self.tokenizer.get_vocab().items()))

    @cached_property
    def digest(self) -> str:
        """sha256 of config.json, the tensors' names, shapes and formats, and samples of their values.

        The samples are the first and the last MiB of each file. They distinguish models that were downloaded or
        built separately, without the cost of reading large files. `weights_digest` reads every byte.
        """
        parts: list[Any] = [json.loads((self.path / "config.json").read_text(encoding="utf-8"))]
        for path in self._weight_files():
            header = tensor_header(path)
            tensors = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}
            with path.open("rb") as file:
                first = hashlib.sha256(file.read(SAMPLE_BYTES)).hexdigest()
                file.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
                parts.append([tensors, first, hashlib.sha256(file.read()).hexdigest()])
        return json_digest(parts)

    @cached_property
    def parameters(self) -> int:
        """Number of elements of all tensors, from the headers of the safetensors files."""
        files = self._weight_files()
        return sum(math.prod(tensor["shape"]) for path in files for tensor in tensor_header(path).values())

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Headers of all tensors that are loaded, by name; see `loaded_tensors` for the errors."""
        return loaded_tensors(self.path)

    @cached_property
    def tokenizer_files(self) -> list[Path]:
        """The files to copy next to every saved policy: tokenizer, chat template and generation config."""
        skipped = {path for pattern in WEIGHT_PATTERNS for path in self.path.glob(pattern)}
        skipped.add(self.path / "config.json")
        return sorted(path for path in self.path.iterdir() if path.is_file() and path not in skipped)

    def _weight_files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))


def given_model(name: str, field: str) -> ModelFolder:
    """Return a model given as a folder or hub id, with its tokenizer loaded.

    A hub model is downloaded if the cache does not have it.

    Args:
        name: the folder or hub id.
        field: the config field that names the model.

    Raises:
        ConfigError: the name is neither a model folder nor a hub id that can be fetched.
    """
    path = Path(expand(name, field))
    if path.is_file():
        raise ConfigError(f"{field} {name}: expected the folder of a model, found a file")
    if not path.exists() and is_local(name):
        raise ConfigError(f"{field} {name}: no such folder{origin(str(path))}")
    model = ModelFolder(newest_snapshot(path.absolute()) if path.is_dir() else _from_hub(name, field), field)
    if is_adapter(model.path):
        raise ConfigError(
            f"{field} {name}: expected a whole model, found {ADAPTER_CONFIG} of an adapter; merge the adapter into "
            "its base model (merge_and_unload of peft), or remove this file if that is done"
        )
    if RunDirectory(model.path).config.is_file() and not (model.path / "config.json").is_file():
        raise ConfigError(
            f"{field} {name}: expected a model folder, found a run directory; name one of its policies, as "
            f"{RunDirectory(Path(name)).exported_policy('online')}, or export one with `rlsys export`"
        )
    if not (model.path / "config.json").is_file():
        raise ConfigError(f"{field} {name}: the folder has no config.json, so it is not a model")
    if not list(model.path.glob("*.safetensors")):
        others = sorted(each.name for each in model.path.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".gguf"))
        named = f" beside {', '.join(others[:3])}" if others else ""
        raise ConfigError(
            f"{field} {name}: expected *.safetensors, found none{named}; other weight formats are not read, so save "
            "the model with save_pretrained of transformers"
        )
    _ = model.tokenizer  # raises if it cannot be loaded
    return model


def _from_hub(name: str, field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, LocalEntryNotFoundError):
            offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
            reason = "HF_HUB_OFFLINE is set, and the cache has none" if offline else f"no answer, none cached: {reason}"
        raise ConfigError(f"{field} {name}: neither a folder here nor a model of the hub ({reason})") from None


def load_config(path: Path, field: str) -> Any:
    """Load the config of a model folder, as transformers understands it.

    Args:
        path: the model folder.
        field: the config field that names the model.

    Raises:
        ConfigError: transformers does not know this kind of model, or a value of config.json is not usable.
    """
    import transformers

    refuse_code(path, field)
    try:
        return transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - its class computes with the folder's values, which are then at fault
        values = _json(path / "config.json")
        kind = (values or {}).get("model_type")
        reason = " ".join(str(error).split())[:200]
        if values and (fault := keys_at_fault(path, error)):
            reason = f"{fault} ({reason})"
        raise ConfigError(
            f"{field} {path}: expected in config.json a model that transformers {transformers.__version__} can load, "
            f"found model_type {kind!r}: {reason}"
        ) from None


def load_tokenizer(path: Path, field: str = "model.path") -> Any:
    """Load the tokenizer of a model folder.

    Args:
        path: the model folder.
        field: the config field that names the model.

    Raises:
        ConfigError: the folder has no tokenizer, or asks for Python code of its own; the message names the field.
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer

    check_text_files(path, field)
    refuse_code(path, field)
    try:
        # Without an explicit False, transformers asks the terminal whether to run the folder's code.
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - its classes compute with the folder's values, which are then at fault
        kind = (_json(path / "config.json") or {}).get("model_type")
        if not isinstance(kind, str) or kind in CONFIG_MAPPING:
            load_config(path, field)  # transformers reads config.json first, and its faults are reported as such
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{field} {path}: expected a model with its tokenizer: {reason}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # A folder without tokenizer files gives an empty tokenizer of the model's class, not an error.
        raise ConfigError(f"{field} {path}: expected a model with its tokenizer, found no tokenizer files")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{field} {path}: the tokenizer has no end-of-sequence token")
    return tokenizer


def check_text_files(folder: Path, field: str) -> None:
    """Raise if config or tokenizer are damaged: a Git LFS pointer, no JSON object, or no text in UTF-8.

    Args:
        folder: the model folder.
        field: the config field that names the model.

    Raises:
        ConfigError: the message names the file.
    """
    for path in (folder / name for name in (*JSON_FILES, *OTHER_FILES)):
        if not path.is_file():
            continue
        if is_lfs_pointer(path):
            raise ConfigError(f"{field} {folder}: {path.name} is a Git LFS pointer; run git lfs pull")
        if path.suffix in (".txt", ".jinja"):
            _check_utf8(path, field)
        if path.name in JSON_FILES:
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                reason = f"{path.name} is not JSON: {error}"
                raise ConfigError(f"{field} {folder}: {reason}; download it again") from None
            if not isinstance(values, dict):
                raise ConfigError(
                    f"{field} {folder}: expected a JSON object in {path.name}, found {type(values).__name__}"
                )


def _check_utf8(path: Path, field: str) -> None:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{field} {path.parent}: {path.name} is not a text in UTF-8: {error}; save it as UTF-8"
        ) from None


def refuse_code(folder: Path, field: str) -> None:
    """Raise if a model folder names Python code of its own, or weights that are not safetensors.

    Args:
        folder: the model folder.
        field: the config field that names the model.

    Raises:
        ConfigError: a config has an `auto_map`, or the weight index names files other than its safetensors.
    """
    for path in sorted(folder.glob("*config*.json")):
        if _names_code(_json(path)):
            raise ConfigError(
                f"{field} {folder}: {path.name} names Python code of its own (auto_map), which is never run; remove "
                "the key if transformers has a class for this model, or choose another model"
            )
    for path in sorted(folder.glob("*.safetensors.index.json")):
        index = _json(path)
        files = index.get("weight_map") if isinstance(index, dict) else None
        for name in sorted(map(str, files.values())) if isinstance(files, dict) else ():
            if "/" in name or not name.endswith(".safetensors"):
                raise ConfigError(
                    f"{field} {folder}: {path.name} names {name!r}; expected *.safetensors in the same folder, other "
                    "weight formats are not read"
                )


def _json(path: Path) -> Any:
    """Read a JSON file; return None if it is not JSON, because its reader reports that."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _names_code(values: Any) -> bool:
    """Return whether a JSON value has an `auto_map` at any depth. Composite models have one in a nested config."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_policy(folder: Path) -> bool:
    """Return whether a folder holds a policy: a whole model, or an adapter."""
    return (folder / "config.json").is_file() or is_adapter(folder)


def weights_digest(folder: Path) -> str:
    """Return the sha256 of a policy: its config, and names and contents of the safetensors files.

    Every byte is read, which takes about one second per GB. The digest of an adapter leaves out the path of its base.
    """
    adapter = is_adapter(folder)
    config = json.loads((folder / (ADAPTER_CONFIG if adapter else "config.json")).read_text(encoding="utf-8"))
    if adapter:
        config.pop("base_model_name_or_path", None)
    parts: list[Any] = [config]
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            parts.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return json_digest(parts)


def json_digest(values: Any) -> str:
    """Return the sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
