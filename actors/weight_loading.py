"""Brings buckets of weights into the workers of an engine, between two of its steps."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from actors.weights import has_output_layer
from rlsys.fault_injection import fault
from rlsys.transfer.object_store import Delivery
from rlsys.transfer.shelf import GroupInfo

logger = logging.getLogger(__name__)


class Workers(Protocol):
    """The workers of an engine."""

    def collective_rpc(
        self, method: str | Callable[..., Any], *, args: tuple[Any, ...] = ..., kwargs: Any = ...
    ) -> list[Any]:
        """Call a method of every worker and return their answers."""
        ...


def memory_folder() -> str | None:
    """Return a folder of this node in memory, for private temporary files; None for the system's own choice."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - private files are made there


class BucketLoader:
    """Loader of the buckets of one weight version after the other.

    Args:
        actor: name of the actor, for error messages.
        workers: the engine.
        shares_memory: whether the workers run in this process.

    Attributes:
        request_options: arguments of vLLM's `add_request` that the weights need.
    """

    method = "update_weights"
    """The workers' method that takes a bucket."""

    def __init__(self, actor: str, workers: Workers, shares_memory: bool) -> None:
        self._actor, self._workers, self._shares_memory = actor, workers, shares_memory
        self._group: GroupInfo | None = None
        self._broken: set[str] = set()
        self.request_options: dict[str, Any] = {}

    def load(self, deliveries: Iterable[Delivery], tied_output: str | None = None) -> None:
        """Load all buckets of a version.

        Args:
            deliveries: the buckets.
            tied_output: output layer tied to the embedding, which is skipped if the engine has none.
        """
        skips = tied_output and not all(self._workers.collective_rpc(has_output_layer, args=(tied_output,)))
        self._workers.collective_rpc("start_weight_update")
        self._load_buckets(deliveries, (tied_output,) if tied_output and skips else ())
        self._workers.collective_rpc("finish_weight_update")

    def _load_buckets(self, deliveries: Iterable[Delivery], skip: tuple[str, ...] = ()) -> int:
        """Give all buckets to the workers, and return their version."""
        version = -1
        for delivery in deliveries:
            self._load_bucket(delivery, skip)
            version = delivery.version
            fault("publish.bucket", version=version)
        return version

    def _load_bucket(self, delivery: Delivery, skip: tuple[str, ...]) -> None:
        data = delivery.data
        if data is None and not self._has_arrived(delivery):
            data = delivery.fetch()
        dropped = fault("publish.drop", version=delivery.version)
        update: dict[str, Any] = {
            "actor": self._actor,
            "version": delivery.version,
            "bucket": delivery.bucket,
            "skip": (*skip, *([dropped] if dropped else [])),
        }
        with self._readable(data) as place:
            self._workers.collective_rpc(self.method, kwargs={"update_info": {**update, **place}})

    def _has_arrived(self, delivery: Delivery) -> bool:
        """Return whether all workers received the bucket by broadcast. After a failure the group is not used again."""
        group = delivery.group
        if group is None or group.path in self._broken:
            return False
        if self._group is None or self._group.path != group.path:
            self._group = group
            problem = next(filter(None, self._workers.collective_rpc("join_broadcast", args=(group,))), "")
        else:
            problem = ""
        if not problem and all(self._workers.collective_rpc("await_bucket", args=(delivery.version,))):
            return True
        logger.warning("the broadcast of weights failed, the object store takes over: %s", problem or "lost member")
        self._broken = {group.path}
        self._workers.collective_rpc("leave_broadcast")
        return False

    @contextmanager
    def _readable(self, data: np.ndarray | None) -> Iterator[dict[str, Any]]:
        """Yield the arguments by which the workers find the bytes of a bucket; workers elsewhere read a file."""
        if data is None or self._shares_memory:
            yield {"data": data}
            return
        with tempfile.NamedTemporaryFile(dir=memory_folder(), prefix="rl-weights-") as file:
            data.tofile(file)
            file.flush()
            yield {"path": file.name}
