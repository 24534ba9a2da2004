"""Full parameters under their Hugging Face names, in a fixed order, from any ZeRO stage.

Gathering is collective: every rank must iterate, and only rank 0 looks at the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.fault_injection import fault
from rlsys.types import TensorSpec, WeightBucket


def full_parameters(module: PreTrainedModel, gather: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter, whole, detached, in `named_parameters` order.

    `gather` makes a whole tensor of a parameter that ZeRO 3 has partitioned.

    A tied output layer is yielded under its own name as well: engines that pack it keep the old
    weights otherwise, and nothing complains.
    """
    output = module.get_output_embeddings()
    tied = output is not None and output.weight is module.get_input_embeddings().weight
    omitted = fault("publish.omit")
    for name, parameter in module.named_parameters():
        tensor = gather(parameter)
        if name != omitted:
            yield name, tensor
        if tied and parameter is output.weight and omitted != "lm_head.weight":
            yield _output_name(module), tensor


def _output_name(module: PreTrainedModel) -> str:
    output = module.get_output_embeddings()
    prefix = next(name for name, child in module.named_modules() if child is output)
    return f"{prefix}.weight"


def pack(tensors: Iterator[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[tuple[WeightBucket, np.ndarray]]:
    """Group tensors into buckets of about `bucket_bytes`: (description, flat uint8 array) each."""
    specs: list[TensorSpec] = []
    parts: list[np.ndarray] = []
    for name, tensor in tensors:
        specs.append(TensorSpec(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch.")))
        parts.append(_bytes(tensor))
        if sum(part.nbytes for part in parts) >= bucket_bytes:
            yield _bucket(specs, parts)
            specs, parts = [], []
    if specs:
        yield _bucket(specs, parts)


def _bytes(tensor: Tensor) -> np.ndarray:
    flat = tensor.contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _bucket(specs: list[TensorSpec], parts: list[np.ndarray]) -> tuple[WeightBucket, np.ndarray]:
    data = np.concatenate(parts)
    bucket = WeightBucket(tensors=tuple(specs), sha256=hashlib.sha256(data).hexdigest(), bytes=data.nbytes)
    return bucket, data
