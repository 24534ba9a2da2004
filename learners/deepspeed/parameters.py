"""The parameters that the learner publishes: whole tensors under their Hugging Face names, in a fixed order.

They come from any ZeRO stage. Gathering is collective: every rank must iterate, and only rank 0 uses the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.fault_injection import fault


def full_parameters(module: PreTrainedModel, gather: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter in `named_parameters` order; whole and detached.

    A tied output layer is yielded under its own name as well: engines that pack it would silently keep its old weights
    otherwise.

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
