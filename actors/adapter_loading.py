"""Brings the adapter of a policy (LoRA) into an engine: the one it begins with, and every published version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.engine_build import adapter_request
from actors.settings import ActorSettings
from actors.weight_loading import BucketLoader, Workers
from actors.weights import ModelTensors
from rlsys.errors import WeightSyncError
from rlsys.models.adapters import AdapterSpec, adapter_spec
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


class AdapterLoader(BucketLoader):
    """Loader of the adapter of one weight version after the other. The base model stays as it is.

    Args:
        actor, workers, shares_memory: see `BucketLoader`.
        adapter: the adapter. The engine gets its first version at once.
    """

    method = "receive_adapter"

    def __init__(self, actor: str, workers: Workers, shares_memory: bool, adapter: ServedAdapter) -> None:
        super().__init__(actor, workers, shares_memory)
        self._spec = adapter.spec
        # All requests have the same one, so that their prefixes are shared.
        self.request_options = {"lora_request": adapter_request()}
        first = (self._spec.to_json(), self._spec.tensors, adapter.folder)
        self._check_layers(self._workers.collective_rpc("first_adapter", args=first), "the first version")

    def load(self, deliveries: Iterable[Delivery], tied_output: str | None = None) -> None:
        """Load all buckets of a version.

        Raises:
            WeightSyncError: the engine does not apply the adapter to all layers.
        """
        self._workers.collective_rpc("start_adapter")
        version = self._load_buckets(deliveries)
        counts = self._workers.collective_rpc("finish_adapter", args=(self._spec.to_json(),))
        self._check_layers(counts, f"weight version {version}")

    def _check_layers(self, counts: Sequence[int], version: str) -> None:
        expected = len(self._spec.layers)
        for count in counts:
            if count != expected:
                raise WeightSyncError(
                    f"actor {self._actor}, {version}: the engine applies the adapter to {count} of {expected} layers"
                )


def build_loader(actor: str, workers: Workers, shares_memory: bool, adapter: ServedAdapter | None) -> BucketLoader:
    """Return the loader of an engine's weights, or of its adapter."""
    if adapter is None:
        return BucketLoader(actor, workers, shares_memory)
    return AdapterLoader(actor, workers, shares_memory, adapter)
