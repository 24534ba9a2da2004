"""Low-rank adapters (LoRA) of a model in the learner: the layer, loading, and the reference policy without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from learners.deepspeed.engine import TrainedModel
from learners.deepspeed.model import load_model, saved_config
from learners.deepspeed.tensor_files import read_tensors
from learners.settings import RankSettings
from rlsys.config.schema import LoraConfig
from rlsys.errors import CheckpointError
from rlsys.models.adapters import ADAPTER_STEM, FACTORS, AdapterSpec, adapter_spec, tensor_name
from rlsys.models.folder import is_adapter


@dataclass(slots=True)
class AdapterSwitch:
    """Choice between policy and reference policy, for all adapted layers of a model.

    Attributes:
        reference: whether layers compute what the reference policy computes.
    """

    reference: bool = False


class LoraLinear(nn.Linear):
    """A frozen linear layer with a trained addition of low rank: `W x + b + scale * B A x`.

    The weight keeps its name in the model. The factors are the weights of the submodules `lora_A` and `lora_B`.

    Args:
        layer: the linear layer, whose parameters are used as they are. They may be partitioned.
        rank: rank of the factors.
        scale: factor of the addition.
        switch: chooses between the policy and the reference policy.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float, switch: AdapterSwitch) -> None:
        nn.Module.__init__(self)  # nn.Linear would make new parameters
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.scale, self._switch = scale, switch
        place: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **place)
        self._reference: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs of the layer under the policy or the reference policy."""
        output = super().forward(input)
        # Also for the reference policy: ZeRO 3 needs the same modules in all passes.
        change = self.lora_B(self.lora_A(input))
        if not self._switch.reference:
            return output + change * self.scale
        if self._reference is None:
            return output
        a, b = self._reference
        return output + nn.functional.linear(nn.functional.linear(input, a), b) * self.scale

    def set_reference(self, a: Tensor, b: Tensor) -> None:
        """Set the factors of the reference policy, which is otherwise the layer without an addition."""
        self._reference = a.to(self.lora_A.weight), b.to(self.lora_B.weight)


def add_adapter(model: PreTrainedModel, lora: LoraConfig, policy: Path, seed: int) -> None:
    """Give a model an adapter, in place. Only the parameters of the adapter have gradients.

    Args:
        model: the base model, which may be partitioned. The adapter is whole on every rank.
        lora: section `model.lora`.
        policy: folder of the adapter; any other folder stands for a new adapter, which changes nothing.
        seed: seed of a new adapter.

    Raises:
        ConfigError: the model cannot have the adapter.
        CheckpointError: the tensors of the adapter are not those of the model.
    """
    spec = adapter_spec(model, lora, policy)
    model.requires_grad_(False)
    switch = AdapterSwitch()
    for name in spec.layers:
        parent, _, child = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, LoraLinear(layer, lora.rank, lora.alpha / lora.rank, switch))
    set_factors(model, read_factors(policy, spec) if is_adapter(policy) else new_factors(spec, seed))


def adapter_of(model: nn.Module, lora: LoraConfig, base: Path) -> AdapterSpec:
    """Return the shape of the adapter that a model has."""
    layers = {name: (layer.out_features, layer.in_features) for name, layer in adapted_layers(model).items()}
    return AdapterSpec(lora=lora, base=base, layers=layers)


def load_policy(
    settings: RankSettings, folder: Path, dtype: str, device: str, *, partitioned: bool = False
) -> PreTrainedModel:
    """Load a policy: a whole model, or the base model with an adapter.

    Args:
        settings: settings of the rank.
        folder: model folder, or folder of the adapter.
        dtype, device, partitioned: see `load_model`.
    """
    if settings.lora is None:
        return load_model(folder, dtype, device, partitioned=partitioned)
    model = load_model(settings.base, dtype, device, partitioned=partitioned)
    add_adapter(model, settings.lora, folder, settings.seed)
    return model


def policy_config(settings: RankSettings, policy: PreTrainedModel, folder: Path) -> PreTrainedConfig | AdapterSpec:
    """Return the config to store with the weights of a policy that `load_policy` has loaded from a folder."""
    if settings.lora is None:
        return saved_config(folder, settings.learner.dtype)
    return adapter_of(policy, settings.lora, settings.base)


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def new_factors(spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
    """Return a new adapter as peft makes it: A uniform in +-1 / sqrt(inputs), and B = 0.

    The numbers do not depend on devices, ranks and number formats.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
    tensors = {}
    for name, shape in spec.tensors.items():
        bound = shape[1] ** -0.5 if name.endswith(f"{FACTORS[0]}.weight") else 0.0
        tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator) if bound else torch.zeros(shape)
    return tensors


def read_factors(folder: Path, spec: AdapterSpec) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder.

    Raises:
        CheckpointError: they are not those of the adapter.
    """
    tensors = dict(read_tensors(folder, ADAPTER_STEM))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != spec.tensors:
        names = sorted(shapes.items() ^ spec.tensors.items())[:1]
        raise CheckpointError(f"{folder}: the tensors are not those of model.lora, the first difference: {names}")
    return tensors


@torch.no_grad()
def set_factors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of an adapter into the layers of a model. Nothing is partitioned yet."""
    for name, layer in adapted_layers(model).items():
        layer.lora_A.weight.copy_(tensors[tensor_name(name, "lora_A")])
        layer.lora_B.weight.copy_(tensors[tensor_name(name, "lora_B")])


class AdapterReference:
    """The reference policy beside an adapted policy: the same base model with the adapter that the stage began with.

    Args:
        policy: the policy, whose engine runs the passes.
        folder: folder of the adapter of the reference policy; any other folder stands for the base model.

    Raises:
        CheckpointError: the tensors of the adapter are not those of the policy.
    """

    def __init__(self, policy: TrainedModel, folder: Path) -> None:
        assert isinstance(policy.saved_config, AdapterSpec)  # noqa: S101 - the policy has an adapter
        tensors = read_factors(folder, policy.saved_config) if is_adapter(folder) else None
        layers = adapted_layers(policy.module)
        for name, layer in layers.items():
            if tensors is not None:
                layer.set_reference(tensors[tensor_name(name, "lora_A")], tensors[tensor_name(name, "lora_B")])
        self._policy = policy
        self._switch = next(iter(layers.values()))._switch

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Return what `LanguageModel` returns. Collective at ZeRO 3."""
        if not self._switch.reference:
            raise RuntimeError("the reference policy is called outside of in_use")
        outputs: tuple[Tensor, Tensor] = self._policy(**inputs)
        return outputs

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the passes of the body compute the reference policy."""
        self._switch.reference = True
        try:
            yield
        finally:
            self._switch.reference = False

    def destroy(self) -> None:
        """Do nothing: the model belongs to the policy."""
