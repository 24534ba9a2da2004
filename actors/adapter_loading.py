"""Brings the adapter of a policy (LoRA) into an engine: the one it begins with, and every published version."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save_file

from actors.engine_build import adapter_request
from actors.settings import ActorSettings
from actors.weight_loading import BucketLoader, Workers, memory_folder
from actors.weights import ModelTensors
from rlsys.errors import WeightSyncError
from rlsys.models.adapters import ADAPTER_STEM, AdapterSpec, adapter_spec
from rlsys.models.tensors import empty_model
from rlsys.transfer.object_store import Delivery


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """The adapter of an engine.

    Attributes:
        folder: folder of the first version; None for a version that changes nothing.
    """

    spec: AdapterSpec
    folder: Path | None = None

    @property
    def expected(self) -> ModelTensors:
        """Names of the tensors of a publish."""
        return ModelTensors(all=frozenset(self.spec.tensors))


def served_adapter(settings: ActorSettings) -> ServedAdapter | None:
    """Return the adapter that an actor serves, or None if it serves whole models."""
    if settings.lora is None:
        return None
    spec = adapter_spec(empty_model(settings.model_path), settings.lora, settings.model_path)
    return ServedAdapter(spec=spec, folder=settings.adapter)


class AdapterEngine(Workers, Protocol):
    """The part of vLLM's engine that loads adapters."""

    def add_lora(self, lora_request: Any) -> bool:
        """Load an adapter into all workers."""
        ...


class AdapterLoader(BucketLoader):
    """Loader of the adapter of one weight version after the other. The base model stays as it is.

    The tensors go through a folder of this node, because that is how vLLM takes an adapter.

    Args:
        actor, shares_memory: see `BucketLoader`.
        engine: the engine, built for adapters. It gets the first version at once.
        adapter: the adapter.
    """

    method = "receive_adapter"

    def __init__(self, actor: str, engine: AdapterEngine, shares_memory: bool, adapter: ServedAdapter) -> None:
        super().__init__(actor, engine, shares_memory)
        self._engine, self._adapter = engine, adapter
        # All requests have the same one, so that their prefixes are shared.
        self.request_options = {"lora_request": adapter_request("policy")}
        if adapter.folder is not None:
            self._add(str(adapter.folder), "the first version")
            return
        with self._folder() as folder:
            zeros = {name: np.zeros(shape, dtype=np.float32) for name, shape in adapter.spec.tensors.items()}
            save_file(zeros, f"{folder}/{ADAPTER_STEM}.safetensors")
            self._add(folder, "the first version")

    def load(self, deliveries: Iterable[Delivery], tied_output: str | None = None) -> None:
        """Load all buckets of a version.

        Raises:
            WeightSyncError: the engine does not apply the adapter to all layers.
        """
        self._workers.collective_rpc("start_adapter")
        version = self._load_buckets(deliveries)
        with self._folder() as folder:
            self._workers.collective_rpc("write_adapter", args=(folder,))
            self._add(folder, f"weight version {version}")

    @contextmanager
    def _folder(self) -> Iterator[str]:
        """Yield a folder that has the adapter's config; it is removed at the end, when the engine has a copy."""
        with tempfile.TemporaryDirectory(dir=memory_folder(), prefix="rl-adapter-") as folder:
            self._adapter.spec.save_pretrained(Path(folder))
            yield folder

    def _add(self, folder: str, version: str) -> None:
        self._engine.add_lora(adapter_request(folder, in_place=True))
        expected = len(self._adapter.spec.layers)
        for count in self._workers.collective_rpc("adapted_layers"):
            if count != expected:
                raise WeightSyncError(
                    f"actor {self._actor}, {version}: the engine applies the adapter to {count} of {expected} layers"
                )


def build_loader(actor: str, engine: AdapterEngine, shares_memory: bool, adapter: ServedAdapter | None) -> BucketLoader:
    """Return the loader of an engine's weights, or of its adapter."""
    if adapter is None:
        return BucketLoader(actor, engine, shares_memory)
    return AdapterLoader(actor, engine, shares_memory, adapter)
