"""Transport of weights by broadcast from learner rank 0 to all engine workers: gloo on CPUs, NCCL on GPUs.

The members share a process group outside the default group of torch.distributed. It lasts until the actors change or
an operation fails. Every bucket is a header with its size and then its bytes; a header of 0 ends a version.

A broadcast needs all its members, so a lost one breaks the group. The others then take what they lack from the object
store, as an actor does that was not up when the version was sent.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlsys.transfer.object_store import ObjectStoreSender
from rlsys.transfer.shelf import BucketReply, BucketRequest, GroupInfo, ShelvedBucket
from rlsys.transfer.wire import PackedBucket, as_tensor, digest_of
from rlsys.weight_types import WeightManifest

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
QUEUED_BUCKETS = 2
OPERATION_SHARE = 0.25
"""Share of weight_sync.timeout_s after which an operation fails; the rest is for the way through the object store."""


class BucketMemory:
    """Host memory of arriving buckets, which is used again when nothing refers to it any more.

    New memory for every bucket would be made of new pages, which takes longer than the broadcast.
    """

    def __init__(self) -> None:
        # Every array, and the part of it that was handed out last, while anything still refers to that.
        self._parts: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def take(self, size: int) -> np.ndarray:
        """Return [size] uint8. A tensor that shares the memory keeps it from being used again."""
        free = (number for number, (array, part) in enumerate(self._parts) if part() is None and array.nbytes >= size)
        number = next(free, len(self._parts))
        array = self._parts[number][0] if number < len(self._parts) else np.empty(size, dtype=np.uint8)
        part = array[:size]
        self._parts[number : number + 1] = [(array, weakref.ref(part))]
        return part


class BroadcastGroup:
    """A process group of learner rank 0 and all engine workers. The constructor waits for all members.

    Args:
        info: the group.
        rank: rank of this process.
        device: the device of the weights in this process.
    """

    def __init__(self, info: GroupInfo, rank: int, device: Any) -> None:
        import torch
        import torch.distributed as dist
        from torch._C import _distributed_c10d as c10d

        limit = datetime.timedelta(seconds=info.timeout_s)
        store = c10d.FileStore(info.path, info.size)
        store.set_timeout(limit)
        prefix = c10d.PrefixStore("weights", store)
        self.path, self._device = info.path, torch.device(device)
        self._memory = BucketMemory()
        self._group: Any
        if self._device.type == "cpu":
            self._group = dist.ProcessGroupGloo(prefix, rank, info.size, limit)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group = dist.ProcessGroupNCCL(prefix, rank, info.size, options)

    def send(self, data: Tensor | None) -> None:
        """Broadcast the bytes of a bucket, or the end of a version. Only rank 0 calls it."""
        import torch

        self._broadcast(torch.tensor([0 if data is None else data.numel()], device=self._device))
        if data is not None:
            self._broadcast(data)

    def receive(self) -> Tensor | None:
        """Return the bytes of the next bucket, or None at the end of a version."""
        import torch

        header = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broadcast(header)
        if not (size := int(header.item())):
            return None
        if self._device.type == "cpu":
            data = as_tensor(self._memory.take(size))
        else:
            data = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._broadcast(data)
        return data

    def _broadcast(self, data: Tensor) -> None:
        import torch

        self._group.broadcast(data, 0).wait()
        if data.device.type == "cuda":
            torch.cuda.current_stream(data.device).synchronize()

    def close(self) -> None:
        """Break the group, so that operations of other members with this one fail at once."""
        with contextlib.suppress(RuntimeError):
            self._group.abort()
        self._group = None


class CollectiveSender(ObjectStoreSender):
    """WeightSender that also broadcasts every bucket to the actors that are up.

    Args:
        put: as in `ObjectStoreSender`.
        bucket_bytes: as in `ObjectStoreSender`.
        device: the device of the weights.
        rendezvous: prefix of the rendezvous files.
        workers: workers of one engine, actors.tensor_parallel_size.
        timeout_s: weight_sync.timeout_s.
    """

    def __init__(
        self,
        put: Callable[[np.ndarray], Any],
        bucket_bytes: int,
        *,
        device: str,
        rendezvous: str,
        workers: int,
        timeout_s: float,
    ) -> None:
        super().__init__(put, bucket_bytes)
        self._device, self._rendezvous, self._workers = device, rendezvous, workers
        self._timeout_s = timeout_s * OPERATION_SHARE
        self._groups = 0
        self._infos: dict[str, GroupInfo] = {}
        self._broken = threading.Event()
        self._broken.set()
        self._group: BroadcastGroup | None = None
        self._queue: queue.Queue[Tensor | None] = queue.Queue(maxsize=QUEUED_BUCKETS)
        self._thread: threading.Thread | None = None

    def send(
        self, tensors: Iterator[tuple[str, Tensor]], *, version: int, attempt: int, members: Sequence[str]
    ) -> WeightManifest:
        """Make all tensors available, and broadcast them meanwhile."""
        if self._thread is not None:
            self._thread.join()  # of the last version; its operations have a limit
        if self._broken.is_set() or tuple(self._infos) != tuple(members):
            self._plan_group(members)
        self._queue = queue.Queue(maxsize=QUEUED_BUCKETS)
        self._thread = threading.Thread(target=self._broadcast_all, name="broadcast", daemon=True)
        self._thread.start()
        try:
            return super().send(tensors, version=version, attempt=attempt, members=members)
        except BaseException:
            self._break()
            raise
        finally:
            self._enqueue(None)

    def _plan_group(self, members: Sequence[str]) -> None:
        """Replace the group by one of other members, which joins when its first bucket is sent."""
        self._break()
        self._groups += 1
        size = 1 + self._workers * len(members)
        self._infos = {
            member: GroupInfo(
                path=f"{self._rendezvous}-weights-{self._groups}",
                rank=1 + self._workers * number,
                size=size,
                timeout_s=self._timeout_s,
            )
            for number, member in enumerate(members)
        }
        if members:
            self._broken.clear()

    def _break(self) -> None:
        """Leave the group, after which the operations of its other members fail at once."""
        self._broken.set()
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _added(self, packed: PackedBucket) -> None:
        self._enqueue(packed.staged)

    def _enqueue(self, data: Tensor | None) -> None:
        """Queue a bucket for the broadcast, and wait while too many are queued."""
        while not self._broken.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(data, timeout=0.1)
                return

    def _broadcast_all(self) -> None:
        """Broadcast the buckets of one version. A failure breaks the group and no more."""
        try:
            while not self._broken.is_set():
                try:
                    data = self._queue.get(timeout=0.1)
                except queue.Empty:
                    continue
                group = self._group = self._group or self._join_group()
                group.send(data)
                if data is None:
                    return
        except Exception as error:  # noqa: BLE001 - the actors take the rest from the object store
            logger.warning("the broadcast of weights failed, the object store takes over: %s", error)
        self._break()

    def _join_group(self) -> BroadcastGroup:
        return BroadcastGroup(next(iter(self._infos.values())), 0, self._device)

    def _reply(self, request: BucketRequest, shelved: ShelvedBucket) -> BucketReply:
        info = self._infos.get(request.member)
        if request.by_store and info is not None:
            self._break()  # this actor has lost the group
        if info is None or request.by_store or self._broken.is_set():
            return super()._reply(request, shelved)
        return BucketReply(bucket=shelved.bucket, last=shelved.last, group=info)


class BroadcastReceiver:
    """Receives the buckets of a group in a thread, one ahead of the engine.

    Args:
        info: the group.
        rank: rank of this worker.
        device: the device of the engine.
    """

    def __init__(self, info: GroupInfo, rank: int, device: Any) -> None:
        self.group = BroadcastGroup(info, rank, device)
        self._arrivals: queue.Queue[tuple[Tensor, str] | None] = queue.Queue(maxsize=1)
        self._next: tuple[Tensor, str] | None = None
        self._thread: threading.Thread | None = None
        self._version = -1

    def wait(self, version: int) -> bool:
        """Wait for the next bucket of a version; return False if the group is broken."""
        if self._version != version:
            if self._thread is not None:
                self._thread.join()  # it ends with the header that ends the last version
            self._version = version
            self._thread = threading.Thread(target=self._receive_all, name="broadcast", daemon=True)
            self._thread.start()
        self._next = self._arrivals.get()
        return self._next is not None

    def take(self) -> tuple[Tensor, str]:
        """Return bytes and digest of the bucket that `wait` waited for."""
        assert self._next is not None  # noqa: S101 - wait comes first
        taken, self._next = self._next, None
        return taken

    def close(self) -> None:
        self.group.close()

    def _receive_all(self) -> None:
        """Receive the buckets of one version. None tells that the group is broken."""
        try:
            while (data := self.group.receive()) is not None:
                self._arrivals.put((data, digest_of(data.cpu().numpy())))
        except Exception as error:  # noqa: BLE001 - the engine takes the rest from the object store
            logger.warning("the broadcast of weights failed, the object store takes over: %s", error)
            self._arrivals.put(None)
