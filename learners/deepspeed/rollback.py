"""Take back a training step that did not come to its end: weights, moments and counters, and gathered gradients.

DeepSpeed 0.19.8 has no call for it. What is set here is what its own optimizers set before and after an update; tests
compare the bits of the next training step at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from rlsys.errors import NonFiniteLossError


class Undoable(Protocol):
    """A model whose updates can be taken back."""

    def keep(self) -> None:
        """Remember what updates change."""

    def put_back(self) -> None:
        """Undo the updates since `keep`. Collective."""

    def discard_gradients(self) -> None:
        """Forget the backward passes since the last update."""


@contextmanager
def undone_unless_finite(models: Sequence[Undoable], updates: int) -> Iterator[None]:
    """Leave models as they were where a NonFiniteLossError, which all ranks raise at once, passes through.

    Args:
        models: that the updates inside may change.
        updates: of each model. One update of one model needs no copies: it is made last of all, and only where
            everything is finite.
    """
    copied = updates * len(models) > 1
    if copied:
        for model in models:
            model.keep()
    try:
        yield
    except NonFiniteLossError:
        for model in models:
            model.discard_gradients()
            if copied:
                model.put_back()
        raise


class Copies:
    """What updates change on one rank: master weights, moments and the optimizer's step counters.

    They lie in host memory and stay allocated: 12 bytes a parameter, divided by the ranks at ZeRO 1 to 3. The module's
    own weights are made of the master weights again.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        found = self._changing()
        if not self._copies:
            self._copies = [torch.empty_like(each, device="cpu", pin_memory=each.is_cuda) for each in found]
        for copy, each in zip(self._copies, found, strict=True):
            copy.copy_(each)

    @torch.no_grad()
    def put_back(self) -> None:
        """Collective."""
        for copy, each in zip(self._copies, self._changing(), strict=True):
            each.copy_(copy)
        _remake_parameters(self._engine.optimizer)

    def _changing(self) -> list[Tensor]:
        inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        found = []
        for weights, entry in inner.state.items():  # of every one, since the engine was built
            found += [weights.data, *(value for value in entry.values() if isinstance(value, Tensor))]
        return found


def _remake_parameters(optimizer: Any) -> None:
    """Give the module the master weights, as the end of an update does; at ZeRO 0 it holds them itself. Collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()  # what is gathered would not change; the next pass gathers it again
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def discard_gradients(engine: Any) -> None:
    """Forget what backward passes have gathered since the last update, wherever a ZeRO stage keeps it."""
    engine._running_engine_step = False  # stays set where an update raises: every pass would then reduce
    engine._unmanaged_backward_count = 0
    engine.zero_grad()
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _discard_at_stage_3(optimizer)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        _discard_at_stage_1_and_2(optimizer)


def _discard_at_stage_1_and_2(optimizer: Any) -> None:
    optimizer.zero_grad()
    optimizer.averaged_gradients.clear()
    optimizer.all_grad_tensors.clear()
    optimizer._release_ipg_buffers()
    optimizer.micro_step_id = -1  # the next pass counts as the first: offloaded sums begin with it
    optimizer._offload_accumulated_param_ids = set()
    optimizer.reset_cpu_buffers()


def _discard_at_stage_3(optimizer: Any) -> None:
    optimizer.zero_grad()  # and sets its count of passes to 0: the next one replaces the sums
    optimizer.averaged_gradients = {}
    optimizer._offload_boundary_param_ids = set()
    optimizer.reset_cpu_buffers()
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear_params()
