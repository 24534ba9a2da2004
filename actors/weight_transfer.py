"""The weight-transfer engine that rlsys registers with vLLM. vLLM builds one in every worker of an engine.

vLLM imports this module in each worker because `WorkerExtension` is named in the arguments of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.engine_build import ADAPTER_ID
from rlsys.errors import WeightSyncError
from rlsys.models.adapters import ADAPTER_STEM
from rlsys.transfer.collective import BroadcastReceiver, BucketMemory
from rlsys.transfer.shelf import GroupInfo
from rlsys.transfer.wire import as_tensor, check_digest, unpack
from rlsys.weight_types import WeightBucket

BACKEND = "rlsys"


@dataclass
class GroupJoin(WeightTransferInitInfo):
    """Arguments of vLLM's RPC `init_weight_transfer_engine`: the group that broadcasts weights."""

    group: GroupInfo


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """Arguments of vLLM's RPC `update_weights`: one bucket.

    Attributes:
        actor: name of the actor, for error messages.
        skip: names of tensors that are not loaded.
        data: the verified bytes, `[bytes] uint8`; None if they were broadcast or are in `path`.
        path: a file with the verified bytes.
    """

    actor: str
    version: int
    bucket: WeightBucket
    skip: tuple[str, ...] = ()
    data: np.ndarray | None = None
    path: str | None = None


class BucketTransferEngine(WeightTransferEngine[GroupJoin, BucketUpdate]):
    """Loads buckets of weights into the model of a worker while generation stands still."""

    init_info_cls = GroupJoin
    update_info_cls = BucketUpdate

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._broadcast: BroadcastReceiver | None = None
        self._actor, self._version = "", -1  # of the newest bucket
        self._adapter: dict[str, torch.Tensor] = {}
        self._memory = BucketMemory()

    def init_transfer_engine(self, info: GroupJoin) -> None:
        """Join the group; return at once if this worker is a member already."""
        group = info.group
        if self._broadcast is not None and self._broadcast.group.path == group.path:
            return
        self.shutdown()
        self._broadcast = BroadcastReceiver(group, group.rank + get_tp_group().rank_in_group, self.device)

    def wait_for_bucket(self, version: int) -> bool:
        """Wait until the next broadcast bucket has arrived; return False if the group is broken."""
        return self._broadcast is not None and self._broadcast.wait(version)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, info: BucketUpdate) -> None:
        self._actor, self._version = info.actor, info.version
        self.model.load_weights(unpack(info.bucket, self._bytes(info), info.skip))

    def start_adapter(self) -> None:
        """Begin a new version of an adapter."""
        self._adapter = {}

    def receive_adapter(self, update_info: dict[str, Any]) -> None:
        """Keep a copy of the tensors of a bucket in host memory, until `take_adapter`."""
        info = self.parse_update_info(update_info)
        data = self._bytes(info)
        kept = as_tensor(self._memory.take(data.numel())).copy_(data)
        self._adapter |= unpack(info.bucket, kept, info.skip)

    def take_adapter(self) -> dict[str, torch.Tensor]:
        """Return the tensors of all buckets."""
        tensors, self._adapter = self._adapter, {}
        return tensors

    def _bytes(self, info: BucketUpdate) -> torch.Tensor:
        if info.data is not None:
            return as_tensor(info.data)
        if info.path is not None:
            return as_tensor(np.fromfile(info.path, dtype=np.uint8))
        assert self._broadcast is not None  # noqa: S101 - wait_for_bucket comes first
        data, digest = self._broadcast.take()
        check_digest(info.actor, info.version, info.bucket, digest)
        return data

    def finish_weight_update(self) -> None:
        """Put the loaded weights in place.

        Raises:
            WeightSyncError: a layer did not get all its weights and would keep old ones.
        """
        if incomplete := incomplete_layers(self.model, tied=bool(self.model_config.hf_config.tie_word_embeddings)):
            raise WeightSyncError(
                f"actor {self._actor}, weight version {self._version}: layer {incomplete[0]} of the engine did not get "
                "all its weights" + (f" (and {len(incomplete) - 1} more layers)" if len(incomplete) > 1 else "")
            )
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        broadcast, self._broadcast = self._broadcast, None
        if broadcast is not None:
            broadcast.close()


def incomplete_layers(model: torch.nn.Module, tied: bool) -> list[str]:
    """Return the names of layers that lack weights between the last bucket of an update and its end.

    vLLM gives such a layer its old weights back, with a warning. A linear layer needs every element. Other layers may
    have padding, so they need at least one. Layers without parameters are computed, not loaded.

    Args:
        model: the model of a worker.
        tied: whether the output layer shares its weights with the embedding, and may get none of its own.
    """
    names = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or not info.load_numel_total or is_deferred_attention_layer(layer):
            continue
        if next(layer.parameters(recurse=False), None) is None or (tied and isinstance(layer, ParallelLMHead)):
            continue
        if isinstance(layer, LinearBase) or info.load_numel <= 0:
            names.append(name)
    return names


def serve_adapter(worker_manager: Any, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> int:
    """Let a worker apply an adapter in place of the last one, and return the number of adapted layers.

    vLLM's own call reads a folder, which takes many times longer.

    Args:
        worker_manager: vLLM's manager of adapters in the worker.
        config: contents of adapter_config.json.
        tensors: its tensors in host memory, which are changed.
    """
    manager, lora_config = worker_manager._adapter_manager, worker_manager.lora_config
    helper = PEFTHelper.from_dict(dict(config))
    helper.validate_legal(lora_config)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        tensors,
        helper,
        device="cpu",
        dtype=lora_config.lora_dtype,
        weights_mapper=mapper.get_rename_mapper() if mapper else None,
    )
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(adapter)
    manager.activate_adapter(ADAPTER_ID)
    return adapted_layers(manager)


def adapted_layers(manager: Any) -> int:
    """Return the number of layers, as the model folder has them, to which a worker applies its adapter.

    Args:
        manager: vLLM's manager of adapters in the model, which fuses neighbouring layers.
    """
    factors = 0
    for name, layer in manager.get_adapter(ADAPTER_ID).loras.items():
        if name in manager.modules:  # vLLM leaves out others without a word
            factors += sum(each is not None for each in layer.lora_b) if isinstance(layer.lora_b, list) else 1
    return factors


class WorkerExtension:
    """Remote calls that rlsys adds to vLLM's workers."""

    weight_transfer_engine: BucketTransferEngine
    model_runner: Any

    def start_adapter(self) -> None:
        """Begin a new version of an adapter."""
        self.weight_transfer_engine.start_adapter()

    def receive_adapter(self, update_info: dict[str, Any]) -> None:
        """Take a bucket of an adapter."""
        self.weight_transfer_engine.receive_adapter(update_info)

    def first_adapter(
        self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], folder: Path | None
    ) -> int:
        """Apply the adapter of a folder, or without one an adapter of zeros; return the number of adapted layers."""
        if folder is None:
            tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        else:
            tensors = load_file(folder / f"{ADAPTER_STEM}.safetensors")
        return serve_adapter(self.model_runner.lora_manager, config, tensors)

    def finish_adapter(self, config: Mapping[str, Any]) -> int:
        """Apply the adapter that has arrived; return the number of adapted layers."""
        tensors = self.weight_transfer_engine.take_adapter()
        return serve_adapter(self.model_runner.lora_manager, config, tensors)

    def join_broadcast(self, group: GroupInfo) -> str:
        """Join a group; return the problem, or "" if all members have joined."""
        try:
            self.weight_transfer_engine.init_transfer_engine(GroupJoin(group=group))
        except Exception as error:  # noqa: BLE001 - the engine takes the weights from the object store
            return f"{type(error).__name__}: {error}"
        return ""

    def await_bucket(self, version: int) -> bool:
        """Wait until the next broadcast bucket has arrived; return False if the group is broken."""
        return self.weight_transfer_engine.wait_for_bucket(version)

    def leave_broadcast(self) -> None:
        """Leave the group."""
        self.weight_transfer_engine.shutdown()


WeightTransferEngineFactory._registry.pop(BACKEND, None)  # of an earlier engine of this process
WeightTransferEngineFactory.register_engine(BACKEND, BucketTransferEngine)
