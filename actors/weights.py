"""Checks and progress of a weight update on an actor."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.errors import WeightSyncError
from rlsys.models.tensors import persistent_buffers, tied_output
from rlsys.types import WeightManifest

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTensors:
    """Names of the tensors of a publish.

    Attributes:
        all: every tensor.
        tied_output: the output layer's weight if the layer is tied to the embedding; None otherwise.
    """

    all: frozenset[str]
    tied_output: str | None = None


def expected_tensors(model_path: Path) -> ModelTensors:
    """Return the names of all parameters and persistent buffers of a model, and of a tied output layer.

    The names come from the Hugging Face class that the learner trains, and no weights are read. The files of an old
    model are no source of names, because they may hold other buffers, or names without the prefix of the class.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model_path, trust_remote_code=False), trust_remote_code=False
        )
    tied = tied_output(model)
    names = [*(name for name, _ in model.named_parameters()), *(name for name, _ in persistent_buffers(model))]
    return ModelTensors(all=frozenset([*names, tied] if tied else names), tied_output=tied)


def without_tensor(tensors: Iterable[tuple[str, torch.Tensor]], name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors but one."""
    return (entry for entry in tensors if entry[0] != name)


def has_output_layer(worker: Any, weight: str) -> bool:
    """Return whether the model of an engine's worker has an output layer beside the embedding.

    Where the two are tied, some models, like Gemma 2, compute the output with the embedding alone and refuse to load an
    output layer. Other models have one, and it may be a packed copy, which must get its weights.

    Args:
        worker: a worker of vLLM.
        weight: name of the output layer's weight at the learner. At the engine, another prefix is possible.
    """
    layer = weight.rpartition(".")[0].rpartition(".")[2]
    return any(
        name.rpartition(".")[2] == layer or any(base.__name__ == "ParallelLMHead" for base in type(module).__mro__)
        for name, module in worker.get_model().named_modules(remove_duplicate=False)
    )


def check_names(actor: str, manifest: WeightManifest, expected: Iterable[str]) -> None:
    """Raise if a tensor of the model is not in the manifest.

    Raises:
        WeightSyncError: A tensor is missing. The message names actor, tensor and version.
    """
    missing = sorted(set(expected) - set(manifest.names))
    if missing:
        raise WeightSyncError(
            f"actor {actor}, weight version {manifest.version}: tensor {missing[0]} is missing from the publish"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )


class LoadProgress:
    """Iterable over tensors that counts them and keeps the last name, for the message of a failed load."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        self._tensors = tensors
        self.last = "none"
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors:
            self.last = name
            self.count += 1
            yield name, tensor


def is_about_weights(record: logging.LogRecord) -> bool:
    """Return whether a warning of vLLM's reload is about weights. Tables of rotary embeddings are computed, not loaded.

    Use it as a filter of the logger RELOAD_LOGGER, which otherwise warns about these tables after every publish.
    """
    message = record.getMessage()
    return not ("RotaryEmbedding" in message and "Failed to load weights" in message)
