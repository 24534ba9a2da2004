"""Checks and progress of a weight update on an actor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from rlsys.errors import WeightSyncError
from rlsys.types import WeightManifest


def expected_tensors(model_path: Path) -> frozenset[str]:
    """Return the names of all parameters of a model, and of a tied output layer. No weights are read.

    The names come from the Hugging Face class that the learner trains. The files of an old model are no source of
    names, because they may hold buffers, or names without the prefix of the class.
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
    """Raise if a tensor of the model is not in the manifest.

    Raises:
        WeightSyncError: A tensor is missing. The message names actor, tensor and version.
    """
    missing = sorted(set(expected) - set(manifest.names))
    if missing:
        raise WeightSyncError(
            f"actor {actor}, weight version {manifest.version}: tensor {missing[0]} is missing from the publish"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        )


class LoadProgress:
    """Iterable over tensors that counts them and keeps the last name, for the message of a failed load."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        self._tensors = tensors
        self.last = "none"
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors:
            self.last = name
            self.count += 1
            yield name, tensor
