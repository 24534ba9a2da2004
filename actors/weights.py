"""Checks and progress of a weight update on an actor."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import WeightSyncError
from rlsys.models.tensors import empty_model, persistent_buffers, tied_output
from rlsys.transfer.object_store import Delivery

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


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
    model = empty_model(model_path)
    tied = tied_output(model)
    names = [*(name for name, _ in model.named_parameters()), *(name for name, _ in persistent_buffers(model))]
    return ModelTensors(all=frozenset([*names, tied] if tied else names), tied_output=tied)


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


class CheckedDeliveries:
    """Iterable over the buckets of a version that ends with a check of their names.

    Args:
        actor: name of the actor, for error messages.
        version: the weight version.
        deliveries: the buckets.
        expected: names of all tensors of the model.

    Attributes:
        first: name of the first tensor of the newest bucket, for the message of a failed load.
        count: number of tensors so far.
    """

    def __init__(
        self, actor: str, version: int, deliveries: Iterable[Delivery] = (), expected: Iterable[str] = ()
    ) -> None:
        self._actor, self._version = actor, version
        self._deliveries, self._expected = deliveries, expected
        self.first = "none"
        self.count = 0

    def __iter__(self) -> Iterator[Delivery]:
        """Yield the buckets.

        Raises:
            WeightSyncError: A tensor of the model is missing. The message names actor, tensor and version.
        """
        missing = set(self._expected)
        for delivery in self._deliveries:
            tensors = delivery.bucket.tensors
            self.first = tensors[0].name
            yield delivery
            self.count += len(tensors)
            missing -= {tensor.name for tensor in tensors}
        if missing:
            raise WeightSyncError(
                f"actor {self._actor}, weight version {self._version}: tensor {min(missing)} is missing from the "
                "publish" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            )


def is_about_weights(record: logging.LogRecord) -> bool:
    """Return whether a warning of vLLM's reload is about weights. Tables of rotary embeddings are computed, not loaded.

    Use it as a filter of the logger RELOAD_LOGGER, which otherwise warns about these tables after every publish.
    """
    message = record.getMessage()
    return not ("RotaryEmbedding" in message and "Failed to load weights" in message)
