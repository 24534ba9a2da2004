"""The attention of a model: the fast one of torch, or the model's own where the fast one would drop a feature."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from learners.small_model import REFUSALS, small_model

FAST, OWN = "sdpa", "eager"


def use_complete_attention(model: PreTrainedModel) -> None:
    """Give a model its own attention if the fast one drops a feature that the model asks for.

    transformers chooses `sdpa` for every model that may use it, and `sdpa` silently ignores arguments it does not know,
    like the soft-capping of Gemma 2. The model's own attention (`eager`) needs memory for the scores of all pairs of
    positions. It is tried on a small model of the same kind.
    """
    try:
        complete = not dropped_features(small_model(model))
    except REFUSALS:
        complete = False
    if not complete:
        model.set_attn_implementation(OWN)


@torch.no_grad()
def dropped_features(model: PreTrainedModel) -> set[str]:
    """Return the arguments that a model hands to the fast attention, and that only its own attention uses.

    The model runs on one token. Models with another attention than the fast one drop nothing.
    """
    fast = AttentionInterface()[FAST]
    dropped: set[str] = set()

    def record(module: nn.Module, *arguments: Any, **features: Any) -> Any:
        set_features = {name for name, value in features.items() if value is not None}
        dropped.update(set_features & _arguments(_own_attention(module)) - _arguments(fast))
        return fast(module, *arguments, **features)

    training = model.training
    AttentionInterface.register(FAST, record)
    try:
        model.eval()(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        AttentionInterface.register(FAST, fast)
        model.train(training)
    return dropped


def _own_attention(module: nn.Module) -> Any:
    """Return the attention function beside the class of an attention module, or None."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) if function else set()
