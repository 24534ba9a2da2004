"""A causal language model from a Hugging Face folder, made a function of its input alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from rlsys.models.scratch import refuse_code

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(path: Path, dtype: str, device: str) -> PreTrainedModel:
    """The model of a folder, without training noise. dtype: "fp32" or "bf16".

    Raises:
        ConfigError: the folder asks for code of its own, or for weights that are no safetensors.
    """
    from transformers import AutoModelForCausalLM

    refuse_code(path, "model folder")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[dtype], trust_remote_code=False, use_safetensors=True
    )
    remove_noise(model)
    return model.to(device)


def load_critic(path: Path, dtype: str, device: str) -> PreTrainedModel:
    """A model with one output a token in place of the vocabulary, from the folder of a policy or of such a model.

    The output of a policy's folder begins as 0, so that a critic knows nothing at first and no seed decides it.

    Raises:
        ConfigError: as `load_model`.
    """
    from transformers import AutoModelForTokenClassification

    refuse_code(path, "model folder")
    model, found = AutoModelForTokenClassification.from_pretrained(
        path,
        num_labels=1,
        dtype=DTYPES[dtype],
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    for name, parameter in model.named_parameters():
        if name in found["missing_keys"]:
            nn.init.zeros_(parameter)
    remove_noise(model)
    return model.to(device)


def saved_config(path: Path, dtype: str) -> PreTrainedConfig:
    """The config to store beside the trained weights: the user's own, with its dropout, in the format they have."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config.dtype = DTYPES[dtype]
    return config


def remove_noise(model: nn.Module) -> None:
    """Set every dropout and jitter of a model to 0, wherever the architecture keeps it.

    The ratio of the objective compares two evaluations of one policy, and the probe compares the learner
    with an engine that has no dropout: with noise neither would mean anything. `eval()` is no way out,
    because gradient checkpointing works in training mode only. Modules keep the probability as a Dropout
    module, as a number of their own, or read it from the config while they run; all three are set.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_noise(module)
        _zero_noise(getattr(module, "config", None))


def _zero_noise(holder: Any) -> None:
    for name, value in getattr(holder, "__dict__", {}).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(holder, name, 0.0)
