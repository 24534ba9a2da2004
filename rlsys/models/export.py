"""Write a policy as a folder that transformers, vLLM and other programs open: a whole model, or an adapter of peft.

torch and transformers are imported inside the functions, so that importing this module stays light.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from rlsys.config.schema import LoraConfig
from rlsys.errors import ConfigError
from rlsys.models.adapters import ADAPTER_FILES, ADAPTER_STEM, FACTORS, TORCH_NAMES, merge_adapter, tensor_name
from rlsys.models.folder import ADAPTER_CONFIG, ModelFolder
from rlsys.models.weight_files import INDEX, loaded_tensors, tensor_header

Dtype = Literal["fp32", "bf16"]
FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
GENERATION = "generation_config.json"
PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")
"""Keys of a generation config that change greedy answers too. rlsys generates without them."""


def write_whole(policy: Path, target: Path, dtype: Dtype | None) -> None:
    """Write a policy that is a whole model.

    Args:
        policy: folder of the policy.
        target: an empty folder.
        dtype: number format of the weights; None to keep that of the policy.
    """
    _copy(policy, target, dtype)
    if dtype is not None:
        _note_format(target, dtype)
    _complete_generation_config(target)


def write_merged(base: Path, policy: Path, lora: LoraConfig, target: Path, dtype: Dtype) -> None:
    """Write the base model with the adapter of a policy merged into its weights.

    Args:
        base: folder of the base model.
        policy: folder of the adapter.
        lora: settings of the adapter.
        target: an empty folder.
        dtype: number format of the merged model.

    Raises:
        ConfigError: the base has the weights of an adapted layer under another name.
    """
    weights = loaded_tensors(base)
    names = tensor_header(policy / f"{ADAPTER_STEM}.safetensors")
    changed = [name for name in weights if tensor_name(name.removesuffix(".weight"), FACTORS[0]) in names]
    if len(changed) * len(FACTORS) != len(names):
        raise ConfigError(
            f"{base}: expected {len(names) // len(FACTORS)} layers of the adapter {policy} among its weights, found "
            f"{len(changed)}: their names in the files differ, so they cannot be merged; use --adapter"
        )
    for path in sorted(policy.iterdir()):
        if path.name not in ADAPTER_FILES:
            shutil.copyfile(path, target / path.name)
    merge_adapter(base, policy, lora, target, dtype)
    _note_format(target, dtype)
    _complete_generation_config(target)


def write_adapter(policy: Path, target: Path, base_name: str, dtype: Dtype | None) -> None:
    """Write a policy that is an adapter, as it is.

    Args:
        policy: folder of the adapter.
        target: an empty folder.
        base_name: folder or hub id of the base model, for adapter_config.json.
        dtype: number format of the factors; None to keep that of the policy.
    """
    _copy(policy, target, dtype)
    values = json.loads((target / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _write_json(target / ADAPTER_CONFIG, {**values, "base_model_name_or_path": base_name})
    _complete_generation_config(target)


def _copy(policy: Path, target: Path, dtype: Dtype | None) -> None:
    """Copy a folder, with the tensors in another number format unless `dtype` is None."""
    for path in sorted(policy.iterdir()):
        if path.suffix == ".safetensors" and dtype is not None:
            _write_as(path, target / path.name, dtype)
        else:
            shutil.copyfile(path, target / path.name)


def weight_format(folder: Path) -> str:
    """Return the number format of the weights of a model or adapter folder."""
    kinds = {entry["dtype"] for path in folder.glob("*.safetensors") for entry in tensor_header(path).values()}
    return "/".join(sorted(FORMATS.get(kind, kind) for kind in kinds))


def hub_id(name: str) -> str | None:
    """Return a name if the hub's cache on this machine has a model of this name, else None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).expanduser().exists():
        return None
    try:
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except HFValidationError:
        return None


def _write_as(source: Path, target: Path, dtype: Dtype) -> None:
    """Write a safetensors file with its floating-point tensors in another format. One file is in memory at a time."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    kind, tensors = getattr(torch, TORCH_NAMES[dtype]), {}
    with safe_open(source, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dictionary
            tensor = opened.get_tensor(name)
            tensors[name] = tensor.to(kind) if tensor.is_floating_point() else tensor
    save_file(tensors, target, metadata={"format": "pt"})


def _note_format(folder: Path, dtype: Dtype) -> None:
    """Write the number format into config.json, and the size of all tensors into the index of shards."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    _write_json(folder / "config.json", {**config, "dtype": TORCH_NAMES[dtype]})
    index = folder / INDEX
    if index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        offsets = (entry["data_offsets"] for entry in loaded_tensors(folder).values())
        total = sum(end - start for start, end in offsets)
        _write_json(index, {**values, "metadata": {**values.get("metadata", {}), "total_size": total}})


def _complete_generation_config(folder: Path) -> None:
    """Let other programs answer as rlsys does: with all end tokens of the training, and without penalties."""
    model, path = ModelFolder(folder), folder / GENERATION
    given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    values = {key: value for key, value in given.items() if key not in PENALTIES}
    ends, named = model.end_token_ids, given.get("eos_token_id")
    if set(ends) != set(named if isinstance(named, list) else [named]):
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        if values.get("pad_token_id") is None and model.tokenizer.pad_token_id is not None:
            values["pad_token_id"] = model.tokenizer.pad_token_id
    if values != given:
        _write_json(path, values)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
