"""Named tensors on disk: one safetensors file, or shards with an index.

The layout is the one of Hugging Face (`model.safetensors`, or `model-00001-of-00003.safetensors` and
`model.safetensors.index.json`), so a folder of policy tensors opens as a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlsys.errors import CheckpointError
from rlsys.fault_injection import fault

SHARD_BYTES = 4 * 2**30


def write_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    stem: str,
    writes: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors in order. The iterator is always exhausted, because gathering tensors is collective.

    Args:
        tensors: names and whole tensors.
        folder: folder of the files, created if missing.
        stem: start of the file names.
        writes: False on ranks that only take part in gathering.
        shard_bytes: size at which a new shard begins.

    Raises:
        CheckpointError: a file cannot be written.
    """
    tensors = iter(tensors)
    try:
        fault("checkpoint.learner", file=folder.name)
        if writes:
            _write(tensors, folder, stem, shard_bytes)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {stem} cannot be written: {error}; is the disk of run.dir full?") from error
    finally:
        for _ in tensors:
            pass


def _write(tensors: Iterator[tuple[str, Tensor]], folder: Path, stem: str, shard_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors:
        shard[name] = tensor.detach().cpu().contiguous().clone()
        total += shard[name].nbytes
        if sum(value.nbytes for value in shard.values()) >= shard_bytes:
            shards.append(_write_shard(folder, stem, len(shards), shard))
            shard = {}
    if shard or not shards:
        shards.append(_write_shard(folder, stem, len(shards), shard))
    _finish(folder, stem, shards, total)


def read_tensors(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors written by `write_tensors`, one at a time.

    Raises:
        CheckpointError: the files are missing or not safetensors.
    """
    files = sorted(folder.glob(f"{stem}.safetensors")) or sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no {stem}.safetensors")
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from error


def _write_shard(folder: Path, stem: str, index: int, shard: dict[str, Tensor]) -> list[str]:
    save_file(shard, folder / f".{stem}-{index}", metadata={"format": "pt"})
    return list(shard)


def _finish(folder: Path, stem: str, shards: list[list[str]], total: int) -> None:
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        suffix = "" if len(shards) == 1 else f"-{index + 1:05d}-of-{len(shards):05d}"
        file = f"{stem}{suffix}.safetensors"
        (folder / f".{stem}-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        (folder / f"{stem}.safetensors.index.json").write_text(index_text)
