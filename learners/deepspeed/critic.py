"""The critic: the body of a causal language model, with one output per token in place of the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learners.deepspeed.model import load_model
from learners.deepspeed.partition import set_whole, whole_shape
from learners.deepspeed.tensor_files import read_tensors
from learners.language_model import SequenceGroup, run_body
from learners.samples.packing import RowAttention
from rlsys.errors import CheckpointError, ConfigError
from rlsys.models.tensors import persistent_buffers


class Critic(nn.Module):
    """A body with a linear layer `score`, which starts at 0: the first values are 0 for any seed.

    The parameters of the body have the names that they have in the language model.

    Args:
        language_model: the model whose body becomes part of the critic.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.body_name = language_model.base_model_prefix
        body, output = language_model.base_model, language_model.get_output_embeddings()
        self.add_module(self.body_name, body)
        self.score = nn.Linear(
            whole_shape(output.weight)[-1], 1, dtype=output.weight.dtype, device=output.weight.device
        )
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)
        self.sequence: SequenceGroup | None = None
        self.config = body.config
        self.config.num_labels = 1

    def forward(self, input_ids: Tensor, depths: Tensor | None = None, attention: RowAttention | None = None) -> Tensor:
        """Return a value for every token, [B, L]; the inputs are those of `run_body`."""
        if self.sequence is None:
            values: Tensor = self.score(run_body(self.body, input_ids, depths, attention)).squeeze(-1)
            return values
        places = torch.arange(input_ids.numel(), device=input_ids.device)
        own_ids, positions = self.sequence.part(input_ids)
        numbers, own_places = self.sequence.own_places(places, input_ids.shape[1])
        own_values = self.score(run_body(self.body, own_ids, positions)).flatten().index_select(0, own_places)
        return self.sequence.combine(own_values, numbers, len(places)).view_as(input_ids)

    def share(self, sequence: SequenceGroup) -> None:
        """Let the ranks of a group share every row."""
        self.sequence = sequence
        sequence.use_in(self.body)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding, whose rows are the token ids that the critic knows."""
        return self.body.get_input_embeddings()

    @property
    def body(self) -> Any:
        """The layers of the language model below its output layer."""
        return self.get_submodule(self.body_name)

    def gradient_checkpointing_enable(self, **arguments: Any) -> None:
        """Compute the activations of the body again in the backward pass."""
        self.body.gradient_checkpointing_enable(**arguments)


def load_critic(
    policy: Path, dtype: str, device: str, *, partitioned: bool = False, saved: Path | None = None
) -> Critic:
    """Load a critic.

    Args:
        policy: model folder of the policy, whose body a new critic has.
        dtype: "fp32" or "bf16".
        device: "cpu" or "cuda".
        partitioned: see `load_model`. The output of the critic is whole on every rank.
        saved: folder of a saved critic of the same architecture, whose weights it gets; None for a new critic.

    Raises:
        ConfigError: the folder of the policy cannot be used, or the model has no body.
        CheckpointError: the tensors in `saved` are not those of the critic.
    """
    language_model = load_model(policy, dtype, device, partitioned=partitioned)
    if language_model.base_model is language_model or language_model.get_output_embeddings() is None:
        raise ConfigError(
            f"model folder {policy}: objective.value needs a model whose output layer can be replaced, and "
            f"{type(language_model).__name__} has none; choose another objective.policy.estimator than gae"
        )
    critic = Critic(language_model)
    if saved:
        _restore(critic, saved)
    return critic


@torch.no_grad()
def _restore(critic: Critic, folder: Path) -> None:
    """Copy the tensors of a folder into the critic."""
    places = {**dict(critic.named_parameters()), **dict(persistent_buffers(critic))}
    missing = set(places)
    for name, tensor in read_tensors(folder, "model"):
        if name not in places or tensor.shape != whole_shape(places[name]):
            raise CheckpointError(f"{folder}: tensor {name} {tuple(tensor.shape)} has no place in the critic")
        set_whole(places[name], tensor)
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder}: the critic lacks {sorted(missing)[:3]}")
