"""The tensors that the learner trains and publishes: whole tensors under their Hugging Face names, in a fixed order.

This works at any ZeRO stage. Gathering is collective: every rank must iterate, and only rank 0 uses the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.fault_injection import fault
from rlsys.models.adapters import PREFIX
from rlsys.models.tensors import persistent_buffers, tied_output


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return name and value of all parameters that are trained: all, or those of an adapter."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def has_adapter(module: nn.Module) -> bool:
    """Return whether a module has an adapter; its other parameters are frozen."""
    return not all(parameter.requires_grad for parameter in module.parameters())


def adapter_tensors(module: nn.Module, gather: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of an adapter, whole and detached, under the name that peft gives it."""
    return ((f"{PREFIX}{name}", gather(parameter)) for name, parameter in trained_parameters(module))


def published_tensors(
    module: PreTrainedModel, gather: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter, in the order of `named_parameters`, then of every persistent buffer.

    Of a policy with an adapter, only the tensors of the adapter are yielded. The tensors are whole and detached. A tied
    output layer is also yielded under its own name. Otherwise, an engine that has a packed copy of the layer would
    silently keep its old weights.

    Args:
        module: the policy.
        gather: returns the whole tensor of a parameter, which ZeRO 3 has partitioned.
    """
    omitted = fault("publish.omit")
    tensors = adapter_tensors(module, gather) if has_adapter(module) else _tensors(module, gather)
    return (entry for entry in tensors if entry[0] != omitted)


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
