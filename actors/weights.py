"""Receiving a publish: fetch, verify and load, bucket by bucket."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsys.errors import WeightSyncError
from rlsys.fault_injection import fault
from rlsys.types import WeightBucket, WeightManifest


def expected_tensors(model_path: Path) -> frozenset[str]:
    """Names of all parameters of a model, a tied output layer by its own name too; no weights are read.

    They are those of the Hugging Face class, which the learner trains, and not those in the files: old files
    hold buffers, or names without the class's prefix.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model_path, trust_remote_code=False), trust_remote_code=False
        )
    output = model.get_output_embeddings()
    tied = {f"{name}.weight" for name, module in model.named_modules() if module is output}
    return frozenset(name for name, _ in model.named_parameters()) | tied


def check_names(actor: str, manifest: WeightManifest, expected: Iterable[str]) -> None:
    """Every tensor of the model must be in the manifest.

    Raises:
        WeightSyncError: naming actor, tensor and version.
    """
    missing = sorted(set(expected) - set(manifest.names))
    if missing:
        raise WeightSyncError(
            f"actor {actor}, weight version {manifest.version}: tensor {missing[0]} is missing from the publish"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )


def verified_tensors(
    actor: str, manifest: WeightManifest, references: Sequence[Any], fetch: Callable[[Any], np.ndarray]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Fetch one bucket after another and yield its tensors, once its checksum agreed.

    Raises:
        WeightSyncError: a checksum or size differs, naming actor, first tensor of the bucket and version.
    """
    for bucket, reference in zip(manifest.buckets, references, strict=True):
        data = fetch(reference)
        found = hashlib.sha256(data.data).hexdigest()
        if found != bucket.sha256:
            raise WeightSyncError(
                f"actor {actor}, weight version {manifest.version}: the bucket that starts with tensor "
                f"{bucket.tensors[0].name} has sha256 {found[:12]}, expected {bucket.sha256[:12]}"
            )
        dropped = fault("publish.drop", version=manifest.version)
        yield from (item for item in unpack(bucket, data) if item[0] != dropped)
        fault("publish.bucket", version=manifest.version)


class Progress:
    """Iterates over tensors and remembers the last name, for the message of a failed load, and how many there were."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        self._tensors = tensors
        self.last = "none"
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors:
            self.last = name
            self.count += 1
            yield name, tensor


def unpack(bucket: WeightBucket, data: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, as views of `data` ([bytes] uint8)."""
    start = 0
    # Ray's shared memory is read-only, which torch warns of; the engine only copies out of these views.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    for spec in bucket.tensors:
        raw = torch.from_numpy(data[start : start + spec.bytes])
        yield spec.name, raw.view(getattr(torch, spec.dtype)).view(spec.shape)
        start += spec.bytes
