"""Parameters that are partitioned over the ranks while they are loaded (ZeRO 3): no rank ever holds a whole model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def partition_parameters(dtype: torch.dtype) -> Iterator[None]:
    """Keep only this rank's part of every parameter that a module gets in the body of the context.

    Every rank reads whole tensors, one after the other, and takes its part. So nothing is collective, and a rank that
    cannot read leaves no other rank waiting.

    Args:
        dtype: format of the parts.
    """
    partitioner = _partitioner(dtype)

    def partition(_module: nn.Module, _name: str, parameter: Any) -> None:
        if parameter is not None and not parameter.is_meta and not is_partitioned(parameter):
            parameter.data = parameter.data.to(dtype)
            partitioner._convert_to_zero_parameters([parameter])

    hook: Any = register_module_parameter_registration_hook(partition)
    asynchronous = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads of transformers would read ahead, and hold whole tensors
    try:
        yield
    finally:
        hook.remove()
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        if asynchronous is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = asynchronous


def _partitioner(dtype: torch.dtype) -> Any:
    """Return DeepSpeed's partitioner of parameters, without its broadcast from rank 0."""
    import deepspeed

    class Partitioner(deepspeed.zero.Init):
        def _zero_init_param(self, parameter: Any) -> None:
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return Partitioner(module=nn.Module(), config_dict_or_path=config)


def restart_numbers() -> None:
    """Number partitioned parameters from 0 again, when no model is left.

    DeepSpeed counts them and compares the numbers of all ranks. A rank that could not read a model has counted less.
    """
    import deepspeed

    deepspeed.zero.Init.param_id = 0


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether DeepSpeed has partitioned a parameter."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> torch.Size:
    """Return the shape of the whole parameter, which may be partitioned."""
    shape: torch.Size = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


def own_part(parameter: Any, tensor: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor that belongs to a partitioned parameter, flat and padded with 0."""
    size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
    own = tensor.flatten()[size * rank :][:size]
    return nn.functional.pad(own, (0, size - own.numel()))


@torch.no_grad()
def set_whole(place: Any, tensor: Tensor) -> None:
    """Set a parameter, which may be partitioned, or a buffer to the value of a whole tensor."""
    if is_partitioned(place):
        place.ds_tensor.copy_(own_part(place, tensor))
    else:
        place.copy_(tensor)
