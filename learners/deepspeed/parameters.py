"""The tensors that the learner publishes: whole tensors under their Hugging Face names, in a fixed order.

This works at any ZeRO stage. Gathering is collective: every rank must iterate, and only rank 0 uses the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.fault_injection import fault
from rlsys.models.tensors import persistent_buffers, tied_output


def published_tensors(
    module: PreTrainedModel, gather: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter, in the order of `named_parameters`, then of every persistent buffer.

    The tensors are whole and detached. A tied output layer is also yielded under its own name. Otherwise, an engine
    that has a packed copy of the layer would silently keep its old weights.

    Args:
        module: the policy.
        gather: returns the whole tensor of a parameter, which ZeRO 3 has partitioned.
    """
    omitted = fault("publish.omit")
    return (entry for entry in _tensors(module, gather) if entry[0] != omitted)


def _tensors(module: PreTrainedModel, gather: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    tied = tied_output(module)
    embedding = module.get_input_embeddings().weight
    for name, parameter in module.named_parameters():
        tensor = gather(parameter)
        yield name, tensor
        if tied and parameter is embedding:
            yield tied, tensor
    for name, buffer in persistent_buffers(module):
        yield name, buffer.detach()
