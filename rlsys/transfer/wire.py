"""Weights as bytes: consecutive tensors packed into buckets, each with a sha256. All transports share this format.

Functions import torch when they are called, so that the driver can load a transport without torch.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from rlsys.errors import WeightSyncError
from rlsys.fault_injection import fault
from rlsys.types import TensorSpec, WeightBucket, WeightManifest

if TYPE_CHECKING:
    from torch import Tensor


def pack(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[tuple[WeightBucket, np.ndarray]]:
    """Yield consecutive tensors in buckets; a bucket closes with the tensor that fills it.

    The same tensor under two names, one after the other, is packed once.

    Args:
        tensors: name and value of every tensor, in the order in which they are sent.
        bucket_bytes: size at which a bucket closes, >= 1.

    Yields:
        The description of a bucket and its bytes, `[bytes] uint8`.
    """
    specs: list[TensorSpec] = []
    parts: list[np.ndarray] = []
    last: Tensor | None = None
    for name, tensor in tensors:
        alias = tensor is last
        if not alias and sum(part.nbytes for part in parts) >= bucket_bytes:
            yield _close_bucket(specs, parts)
            specs, parts = [], []
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype, alias=alias))
        if not alias:
            parts.append(_tensor_bytes(tensor))
        last = tensor
    if specs:
        yield _close_bucket(specs, parts)


def unpack(bucket: WeightBucket, data: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor of a bucket. The tensors are views of `data`, `[bytes] uint8`."""
    import torch

    start, value = 0, torch.empty(0)
    # torch warns about read-only arrays, such as Ray's shared memory; the engine only copies out of these views.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    for spec in bucket.tensors:
        if not spec.alias:
            raw = torch.from_numpy(data[start : start + spec.bytes])
            value = raw.view(getattr(torch, spec.dtype)).view(spec.shape)
            start += spec.bytes
        yield spec.name, value


def verified_tensors(
    actor: str, manifest: WeightManifest, buckets: Iterable[np.ndarray]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a version. Each bucket is fetched when it is needed, and verified first.

    Args:
        actor: name of the receiving actor, for error messages.
        manifest: description of the version.
        buckets: the bytes of every bucket of the manifest, in order, `[bytes] uint8` each.

    Raises:
        WeightSyncError: a checksum or size differs; names actor, first tensor of the bucket and version.
    """
    for bucket, data in zip(manifest.buckets, buckets, strict=True):
        digest = hashlib.sha256(data.data).hexdigest()
        if digest != bucket.sha256:
            raise WeightSyncError(
                f"actor {actor}, weight version {manifest.version}: the bucket that starts with tensor "
                f"{bucket.tensors[0].name} has sha256 {digest[:12]}, expected {bucket.sha256[:12]}"
            )
        dropped = fault("publish.drop", version=manifest.version)
        yield from (item for item in unpack(bucket, data) if item[0] != dropped)
        fault("publish.bucket", version=manifest.version)


def _tensor_bytes(tensor: Tensor) -> np.ndarray:
    import torch

    flat = tensor.contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _close_bucket(specs: list[TensorSpec], parts: list[np.ndarray]) -> tuple[WeightBucket, np.ndarray]:
    data = np.concatenate(parts)
    bucket = WeightBucket(tensors=tuple(specs), sha256=hashlib.sha256(data).hexdigest(), bytes=data.nbytes)
    return bucket, data
