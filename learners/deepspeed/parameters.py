"""The parameters that the learner publishes: whole tensors under their Hugging Face names, in a fixed order.

This works at any ZeRO stage. Gathering is collective: every rank must iterate, and only rank 0 uses the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.fault_injection import fault


def full_parameters(module: PreTrainedModel, gather: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter, whole and detached, in the order of `named_parameters`.

    A tied output layer is also yielded under its own name. Otherwise, an engine that has a packed copy of the layer
    would silently keep its old weights.

    Args:
        module: the policy.
        gather: returns the whole tensor of a parameter, which ZeRO 3 has partitioned.
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
