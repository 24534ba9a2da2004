"""Low-rank adapters (LoRA): the layers that get one, names and files in the format of peft, and the merge.

An adapted linear layer computes `W x + alpha / rank * B A x`. W stays as it is; A, `[rank, in]`, and B, `[out, rank]`,
are trained. B starts at 0, so a new adapter changes nothing. A policy of a run with model.lora is a folder with
adapter_config.json and adapter_model.safetensors, which peft and vLLM read. The base model stays in its own folder.

torch and transformers are imported inside the functions, so that importing this module stays light.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config.schema import LoraConfig
from rlsys.errors import ConfigError
from rlsys.models.folder import ADAPTER_CONFIG, ModelFolder
from rlsys.models.scratch import UnbuiltModel
from rlsys.models.tensors import empty_model

ADAPTER_STEM = "adapter_model"
ADAPTER_FILES = (ADAPTER_CONFIG, f"{ADAPTER_STEM}.safetensors")
PREFIX = "base_model.model."
"""Prefix that peft adds to the names of the base model's modules."""
FACTORS = ("lora_A", "lora_B")
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
WITHOUT_ADAPTERS = frozenset(
    {
        "BloomForCausalLM",
        "FalconForCausalLM",
        "FalconMambaForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "Gemma3nForCausalLM",
        "HrmTextForCausalLM",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "StableLmForCausalLM",
        "Zamba2ForCausalLM",
    }
)
"""Models of transformers that vLLM serves, but without adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Shape of an adapter.

    Attributes:
        lora: section `model.lora`.
        base: folder of the base model.
        layers: adapted layers in the order of the model, each with its numbers of outputs and inputs.
    """

    lora: LoraConfig
    base: Path
    layers: Mapping[str, tuple[int, int]]

    @property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """Shapes of all tensors, by their names in the files and on the way to the actors."""
        shapes: dict[str, tuple[int, int]] = {}
        for layer, (outputs, inputs) in self.layers.items():
            shapes[tensor_name(layer, "lora_A")] = (self.lora.rank, inputs)
            shapes[tensor_name(layer, "lora_B")] = (outputs, self.lora.rank)
        return shapes

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(rows * columns for rows, columns in self.tensors.values())

    def describe(self) -> str:
        """Return a line for the user about the size of the adapter."""
        return f"model.lora: {self.parameters:,} trained parameters in {len(self.layers)} linear layers"

    def save_pretrained(self, folder: Path) -> None:
        """Write the adapter_config.json that peft and vLLM read."""
        text = json.dumps(self.to_json(), indent=2, sort_keys=True) + "\n"
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """Return the contents of adapter_config.json."""
        return {
            "base_model_name_or_path": str(self.base),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.lora.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.lora.rank,
            "target_modules": self._targets(),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }

    def _targets(self) -> list[str]:
        targets = self.lora.target_modules
        if isinstance(targets, str):
            return sorted({layer.rpartition(".")[2] for layer in self.layers})
        return sorted(targets)


def tensor_name(layer: str, factor: str) -> str:
    """Return the name of a tensor of an adapter, as peft has it."""
    return f"{PREFIX}{layer}.{factor}.weight"


def adapter_spec(model: Any, lora: LoraConfig, base: Path) -> AdapterSpec:
    """Return the adapter of a model.

    Args:
        model: a causal language model of transformers; its values are not read.
        lora: section `model.lora`.
        base: folder of the model.

    Raises:
        ConfigError: a target is missing or no linear layer, or vLLM serves the model without adapters.
    """
    if type(model).__name__ in WITHOUT_ADAPTERS:
        raise ConfigError(f"model.lora: vLLM serves {type(model).__name__} ({base}) without adapters; take it out")
    linear, others = _linear_layers(model)
    return choose_layers(linear, others, lora, base)


def choose_layers(
    linear: Mapping[str, tuple[int, int]], others: Sequence[str], lora: LoraConfig, base: Path
) -> AdapterSpec:
    """Return the adapter of the layers that model.lora.target_modules names.

    Args:
        linear: numbers of outputs and inputs of all layers that can have an adapter, by name.
        others: names of all other modules, for the message.
        lora: section `model.lora`.
        base: folder of the model.

    Raises:
        ConfigError: a target is missing, or cannot have an adapter.
    """
    targets = lora.target_modules
    if isinstance(targets, str):
        return AdapterSpec(lora=lora, base=base, layers=linear)
    for target in targets:
        if not any(_matches(layer, target) for layer in linear):
            near = next((layer for layer in others if _matches(layer, target)), None)
            kind = f"{near}, which cannot have an adapter" if near else "no layer of this name"
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in linear})) or "none"
            raise ConfigError(
                f"model.lora.target_modules {target}: expected linear layers of {base} below the output layer "
                f"({known}), found {kind}"
            )
    layers = {name: size for name, size in linear.items() if any(_matches(name, target) for target in targets)}
    return AdapterSpec(lora=lora, base=base, layers=layers)


def _matches(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _linear_layers(model: Any) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Return the sizes of all linear layers but the output layer, and the names of all other modules."""
    from torch import nn

    output = model.get_output_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    others = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not output:
            linear[name] = (module.out_features, module.in_features)
        else:
            others.append(name)
    return linear, others


def check_adapter(model: ModelFolder, lora: LoraConfig) -> AdapterSpec:
    """Return the adapter of a model folder, from its config.json and the headers of its weights.

    Raises:
        ConfigError: the model cannot have the adapter, or the weights of an adapted layer cannot be merged.
    """
    if isinstance(model, UnbuiltModel):
        return choose_layers(model.linear_layers, [], lora, model.path)
    spec = adapter_spec(empty_model(model.path), lora, model.path)
    absent = [layer for layer in spec.layers if f"{layer}.weight" not in model.tensors]
    if lora.merge and absent:
        raise ConfigError(
            f"model.lora.merge: {model.path} has the weights of {absent[0]} under another name, so that an adapter "
            "cannot be merged into its files; set it to false"
        )
    return spec


def read_adapter(folder: Path) -> tuple[Path, LoraConfig]:
    """Return the base model and the settings of an adapter folder.

    Raises:
        ConfigError: adapter_config.json is damaged, asks for something else than plain LoRA, or its base is no folder.
    """
    path = folder / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        targets = values["target_modules"]
        named = targets if isinstance(targets, str) else tuple(targets)
        lora = LoraConfig(rank=values["r"], alpha=values["lora_alpha"], target_modules=named)
        base = Path(values["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected a LoRA adapter as rlsys writes it: {' '.join(str(error).split())}"
        ) from None
    if not (base / "config.json").is_file():
        raise ConfigError(
            f"{path}: base_model_name_or_path {base} is no folder of a model; write the folder of the base there"
        )
    return base, lora


def merge_adapter(base: Path, adapter: Path, lora: LoraConfig, target: Path, dtype: str) -> None:
    """Write the base model with an adapter merged into its weights. The tokenizer is not written.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter.
        lora: section `model.lora` of the adapter.
        target: folder that gets config and weights, in the shards of the base.
        dtype: "fp32" or "bf16", the format of the merged model.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    factors, kind = load_file(adapter / f"{ADAPTER_STEM}.safetensors"), getattr(torch, TORCH_NAMES[dtype])
    for file in sorted(base.glob("*.safetensors")):
        merged: dict[str, Any] = {}
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                tensor, layer = opened.get_tensor(name), name.removesuffix(".weight")
                a, b = (factors.get(tensor_name(layer, factor)) for factor in FACTORS)
                if a is not None and b is not None:
                    tensor = tensor.float() + lora.alpha / lora.rank * (b.float() @ a.float())
                merged[name] = tensor.to(kind) if tensor.is_floating_point() else tensor
        save_file(merged, target / file.name, metadata={"format": "pt"})
    for file in base.glob("*.safetensors.index.json"):
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    text = json.dumps({**config, "dtype": TORCH_NAMES[dtype]}, indent=2, sort_keys=True) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
