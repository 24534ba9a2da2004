"""The tensors that make up the weights of a model.

torch is not imported, so that importing this module stays light.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def empty_model(folder: Path) -> Any:
    """Return the model that a folder describes, on torch's device without memory. No weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False
        )


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every buffer that a saved model contains, in a fixed order.

    Such a buffer is a weight that no gradient reaches, like the bias that corrects the choice of experts. Other
    buffers, like rotary frequencies, are computed when a model is built.
    """
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def tied_output(module: Any) -> str | None:
    """Return the name of the output layer's weight if it is the embedding of the input; None otherwise.

    Args:
        module: a causal language model of transformers.
    """
    output, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if output is None or output.weight is not embedding.weight:
        return None
    return next(f"{name}.weight" for name, child in module.named_modules() if child is output)
