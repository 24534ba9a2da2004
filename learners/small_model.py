"""A small model of the same kind as a model, on which a command tries what the learner may do with the model.

Under ZeRO 3 no rank holds a whole layer, so the model itself cannot be tried.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 64
REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)
"""Errors of models that cannot be built small, or not be run in an unusual way."""


def small_model(model: PreTrainedModel, device: torch.device | str | None = None) -> PreTrainedModel:
    """Build a model of the class and config of another one, with few layers and tokens and random weights.

    Args:
        model: the model, whose parameters are not read.
        device: device of the small model; None for that of the model.

    Raises:
        one of REFUSALS: the class cannot be built with fewer layers.
    """
    place, config = device or model.device, _reduced(model.config)
    with torch.random.fork_rng(devices=[]), torch.device(place):
        small: PreTrainedModel = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    generator = torch.Generator(place).manual_seed(0)
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.dim() > 1:  # large enough for every part of the model to matter
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return small.eval()


def _reduced(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config with two layers, or one of each kind, and few tokens."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    count, chosen = text.num_hidden_layers, _chosen_layers(text)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == count > len(chosen):
            setattr(text, name, [value[number] for number in chosen])
    text.num_hidden_layers = len(chosen)
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    text.pad_token_id = None  # may be beyond the small vocabulary
    return config


def _chosen_layers(text: Any) -> list[int]:
    """Return the first layer, the last one, and the first one of every kind."""
    kinds = list(getattr(text, "layer_types", None) or [])
    return sorted({0, text.num_hidden_layers - 1, *(kinds.index(kind) for kind in set(kinds))})
