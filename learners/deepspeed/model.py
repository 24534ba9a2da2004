"""Models from Hugging Face folders, without training noise."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from learners.attention import use_complete_attention
from learners.deepspeed.partition import partition_parameters
from rlsys.models.folder import ModelFolder, refuse_code
from rlsys.models.loading import refuse_differences
from rlsys.models.weight_shapes import refuse_other_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(path: Path, dtype: str, device: str, *, partitioned: bool = False) -> PreTrainedModel:
    """Load a causal language model, with the attention that it defines and without training noise.

    Args:
        path: model folder.
        dtype: "fp32" or "bf16".
        device: "cpu" or "cuda".
        partitioned: keep only this rank's part of every parameter (ZeRO 3), as soon as it is read.

    Raises:
        ConfigError: the folder needs its own code, has weights in another format than safetensors, or has other
            tensors than the model.
    """
    from transformers import AutoModelForCausalLM

    refuse_code(path, "model folder")
    if partitioned:  # transformers gives values to missing tensors, which needs whole parameters
        refuse_other_tensors(ModelFolder(path, "model folder"))
    with partition_parameters(DTYPES[dtype]) if partitioned else nullcontext():
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            output_loading_info=True,
        )
    refuse_differences(f"model folder {path}", loading_info)
    remove_noise(model)
    use_complete_attention(model)
    return model.to(device)


def saved_config(path: Path, dtype: str) -> PreTrainedConfig:
    """Return the config to store with the trained weights: the config in `path`, with its dropout, and `dtype`."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config.dtype = DTYPES[dtype]
    return config


def remove_noise(model: nn.Module) -> None:
    """Set every dropout and jitter of a model to 0.

    The ratio in the objective compares two evaluations of one policy, and the probe compares the learner with an
    engine that has no dropout. Noise would make both comparisons meaningless. `eval()` is no solution, because gradient
    checkpointing works only in training mode. Architectures keep the probability in a Dropout module, in a number on
    another module, or in the config that is read during the forward pass; all three are set.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_noise(module)
        _zero_noise(getattr(module, "config", None))


def _zero_noise(holder: Any) -> None:
    """Set every dropout or jitter probability among the attributes of an object to 0."""
    for name, value in getattr(holder, "__dict__", {}).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(holder, name, 0.0)
