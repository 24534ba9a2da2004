"""Weights as bytes: consecutive tensors packed into buckets, each with a digest. All transports share this format.

Functions import torch when they are called, so that the driver can load a transport without torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from rlsys.errors import WeightSyncError
from rlsys.weight_types import TensorSpec, WeightBucket

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedBucket:
    """A bucket that is ready to be sent.

    Attributes:
        data: its bytes in host memory, `[bytes] uint8`.
        staged: the same bytes on the device of the tensors; on a CPU, a view of `data`.
        last: whether the version has no more buckets.
    """

    bucket: WeightBucket
    data: np.ndarray
    staged: Tensor
    last: bool


def digest_of(data: np.ndarray) -> str:
    """Return the xxh3_128 of bytes, in hexadecimal."""
    return xxhash.xxh3_128(data.data).hexdigest()


def check_digest(actor: str, version: int, bucket: WeightBucket, digest: str) -> None:
    """Raise if the bytes that arrived are not those that were sent.

    Raises:
        WeightSyncError: the digests differ; names actor, first tensor of the bucket and version.
    """
    if digest != bucket.digest:
        raise WeightSyncError(
            f"actor {actor}, weight version {version}: the bucket that starts with tensor "
            f"{bucket.tensors[0].name} has xxh3 {digest[:12]}, expected {bucket.digest[:12]}"
        )


def pack(
    tensors: Iterable[tuple[str, Tensor]],
    bucket_bytes: int,
    buffer: Callable[[int, int], np.ndarray] = lambda _number, size: np.empty(size, dtype=np.uint8),
) -> Iterator[PackedBucket]:
    """Yield consecutive tensors in buckets; a bucket closes with the tensor that fills it.

    The same tensor under two names, one after the other, is packed once.

    Args:
        tensors: name and value of every tensor, in the order in which they are sent.
        bucket_bytes: size at which a bucket closes, >= 1.
        buffer: returns the host memory of a bucket, for its number and size.
    """
    for number, (specs, values, last) in enumerate(_groups(tensors, bucket_bytes)):
        data = buffer(number, sum(spec.bytes for spec in specs))
        staged = _concatenate(values, data)
        bucket = WeightBucket(tensors=specs, digest=digest_of(data), bytes=data.nbytes)
        yield PackedBucket(bucket, data, staged, last)


def unpack(bucket: WeightBucket, raw: Tensor, skip: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor of a bucket. The tensors are views of `raw`, `[bytes] uint8`.

    Args:
        skip: names of tensors that are left out.
    """
    import torch

    start, value = 0, torch.empty(0)
    for spec in bucket.tensors:
        if not spec.alias:
            dtype: torch.dtype = getattr(torch, spec.dtype)
            part = raw[start : start + spec.bytes]
            value = (part.clone() if start % dtype.itemsize else part).view(dtype).view(spec.shape)
            start += spec.bytes
        if spec.name not in skip:
            yield spec.name, value


def as_tensor(data: np.ndarray) -> Tensor:
    """Return a tensor that shares the memory of an array, which may be read-only."""
    import torch

    # torch warns about read-only arrays, such as Ray's shared memory; the engine only copies out of these views.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return torch.from_numpy(data)


def _groups(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[tuple[tuple[TensorSpec, ...], list[Tensor], bool]]:
    """Yield the descriptions and the distinct values of the tensors of every bucket, and whether it is the last."""
    specs: list[TensorSpec] = []
    values: list[Tensor] = []
    last: Tensor | None = None
    size = 0
    for name, tensor in tensors:
        alias = tensor is last
        if not alias and size >= bucket_bytes:
            yield tuple(specs), values, False
            specs, values, size = [], [], 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype, alias=alias))
        size += specs[-1].bytes
        if not alias:
            values.append(tensor)
        last = tensor
    if specs:
        yield tuple(specs), values, True


def _concatenate(values: list[Tensor], data: np.ndarray) -> Tensor:
    """Copy the bytes of tensors to `data`, and return them on the device of the tensors."""
    import torch

    host = torch.from_numpy(data)
    staged = host if values[0].device.type == "cpu" else torch.empty_like(host, device=values[0].device)
    start = 0
    for value in values:
        part = value.detach().contiguous().reshape(-1).view(torch.uint8)
        staged[start : start + part.numel()].copy_(part)
        start += part.numel()
    if staged is not host:
        host.copy_(staged)
    return staged
