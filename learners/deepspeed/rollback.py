"""Rollback of a failed training step: weights, moments, counters and accumulated gradients.

DeepSpeed 0.19.8 has no call for this. The code sets the fields that DeepSpeed's own optimizers set before and after an
update. Tests compare the bits of the next training step at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from rlsys.errors import NonFiniteLossError


class Reversible(Protocol):
    """A model whose updates can be rolled back."""

    def take_snapshot(self) -> None:
        """Copy the state that updates change."""

    def roll_back(self) -> None:
        """Restore the snapshot. Collective."""

    def discard_gradients(self) -> None:
        """Discard the gradients since the last update."""


@contextmanager
def rollback_on_non_finite(models: Sequence[Reversible], updates: int) -> Iterator[None]:
    """Restore models if the body raises a NonFiniteLossError, which all ranks raise together.

    Args:
        models: models that the body may update.
        updates: number of updates of each model. One update of one model needs no snapshot: nothing can fail after it,
            and it is made only if everything is finite.
    """
    needs_snapshot = updates * len(models) > 1
    if needs_snapshot:
        for model in models:
            model.take_snapshot()
    try:
        yield
    except NonFiniteLossError:
        for model in models:
            model.discard_gradients()
            if needs_snapshot:
                model.roll_back()
        raise


class UpdateSnapshot:
    """Copy of the state that updates change on one rank: master weights, moments and the optimizer's step counters.

    The copies are in host memory and stay allocated: 12 bytes per parameter, divided by the ranks at ZeRO 1 to 3. The
    weights of the module are rebuilt from the master weights.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Copy the current state."""
        state = self._optimizer_tensors()
        if not self._copies:
            self._copies = [torch.empty_like(each, device="cpu", pin_memory=each.is_cuda) for each in state]
        for copy, each in zip(self._copies, state, strict=True):
            copy.copy_(each)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the copied state. Collective."""
        for copy, each in zip(self._copies, self._optimizer_tensors(), strict=True):
            each.copy_(copy)
        _rebuild_parameters(self._engine.optimizer)

    def _optimizer_tensors(self) -> list[Tensor]:
        inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        tensors = []
        for weights, entry in inner.state.items():  # the engine's construction made an entry for every parameter
            tensors += [weights.data, *(value for value in entry.values() if isinstance(value, Tensor))]
        return tensors


def _rebuild_parameters(optimizer: Any) -> None:
    """Copy the master weights to the module, as the end of an update does. Collective.

    At ZeRO 0 the module's own weights are the master weights.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()  # drops gathered copies, which are stale; the next pass gathers again
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def discard_gradients(engine: Any) -> None:
    """Discard the gradients since the last update, at any ZeRO stage."""
    engine._running_engine_step = False  # left True by a failed update; every pass would then reduce gradients
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
    optimizer.micro_step_id = -1  # the next pass is the first again, and starts new offloaded sums
    optimizer._offload_accumulated_param_ids = set()
    optimizer.reset_cpu_buffers()


def _discard_at_stage_3(optimizer: Any) -> None:
    optimizer.zero_grad()  # also resets the count of passes, so that the next pass replaces the sums
    optimizer.averaged_gradients = {}
    optimizer._offload_boundary_param_ids = set()
    optimizer.reset_cpu_buffers()
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear_params()
