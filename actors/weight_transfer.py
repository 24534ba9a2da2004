"""The weight-transfer engine that rlsys registers with vLLM. vLLM builds one in every worker of an engine.

vLLM imports this module in each worker because `WorkerExtension` is named in the arguments of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlsys.transfer.collective import BroadcastReceiver
from rlsys.transfer.shelf import GroupInfo
from rlsys.transfer.wire import as_tensor, check_digest, unpack
from rlsys.types import WeightBucket

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
        self.model.load_weights(unpack(info.bucket, self._bytes(info), info.skip))

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
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        broadcast, self._broadcast = self._broadcast, None
        if broadcast is not None:
            broadcast.close()


class WorkerExtension:
    """Remote calls that rlsys adds to vLLM's workers."""

    weight_transfer_engine: BucketTransferEngine

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
