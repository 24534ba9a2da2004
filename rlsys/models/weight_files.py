"""The weight files of a model folder: which of them are loaded, and what their headers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError
from rlsys.files import is_lfs_pointer

SAMPLE_BYTES = 2**20
"""Bytes at each end of a file or tensor that are compared or hashed."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensor_header(path: Path) -> dict[str, Any]:
    """Read names, formats and shapes of the tensors in a safetensors file, without their values.

    Raises:
        ConfigError: the file is not a whole safetensors file, e.g. a Git LFS pointer or a partial download.
    """
    try:
        if is_lfs_pointer(path):
            raise ConfigError(f"{path}: expected a safetensors file, found a Git LFS pointer; run git lfs pull")
        with path.open("rb") as file:  # 8 bytes of length, then JSON, then the tensors
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if max((entry["data_offsets"][1] for entry in header.values()), default=0) != size - 8 - length:
            raise ValueError("cut short")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a complete safetensors file; download it again") from error
    return header


def have_equal_values(folder: Path, first: str, second: str) -> bool:
    """Return whether two tensors of a folder have equal bytes at their beginning and end, up to a MiB each."""
    return _sampled_bytes(folder, first) == _sampled_bytes(folder, second)


def _sampled_bytes(folder: Path, name: str) -> tuple[str, bytes, bytes]:
    path = folder / (_indexed_files(folder)[name] if (folder / INDEX).is_file() else WEIGHTS)
    entry = tensor_header(path)[name]
    start, end = entry["data_offsets"]
    with path.open("rb") as file:
        origin = 8 + int.from_bytes(file.read(8), "little")
        file.seek(origin + start)
        first = file.read(min(SAMPLE_BYTES, end - start))
        file.seek(origin + max(start, end - SAMPLE_BYTES))
        return entry["dtype"], first, file.read(min(SAMPLE_BYTES, end - start))


def loaded_tensors(folder: Path) -> dict[str, Any]:
    """Return the headers of all tensors that learner and engines load from a folder, by name.

    They load model.safetensors, or the shards that model.safetensors.index.json names.

    Raises:
        ConfigError: the index or a shard is missing, they do not belong together, or there are further weight files.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    if not (folder / INDEX).is_file():
        if WEIGHTS not in present:
            raise ConfigError(
                f"{folder}: expected {WEIGHTS}, or {INDEX} with its shards, found neither beside "
                f"{_listed(present)}; download the whole model"
            )
        if present != {WEIGHTS}:
            # An engine without an index loads every weight file of a folder.
            others = _listed(present - {WEIGHTS})
            raise ConfigError(f"{folder}: expected {WEIGHTS} alone, found also {others}; move other weights away")
        return tensor_header(folder / WEIGHTS)
    places = _indexed_files(folder)
    shards = set(places.values())
    if missing := shards - present:
        raise ConfigError(f"{folder}: {INDEX} names {_listed(missing)}, which is missing; download the whole model")
    if WEIGHTS in present - shards:
        raise ConfigError(f"{folder}: found both {WEIGHTS} and {INDEX}, which names other files; remove one of them")
    headers = {name: tensor_header(folder / name) for name in sorted(shards)}
    for tensor, name in places.items():
        if tensor not in headers[name]:
            raise ConfigError(
                f"{folder}: {INDEX} says that {name} holds the tensor {tensor}, but it does not; index and shards are "
                "of different models"
            )
    return {tensor: entry for header in headers.values() for tensor, entry in header.items()}


def _indexed_files(folder: Path) -> dict[str, str]:
    """Return the file of every tensor that the index names."""
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(name) for tensor, name in places.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder}: {INDEX} is damaged: expected a JSON object with a weight_map") from None


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
