"""The reference policy on one rank: it is never trained, and takes no memory of the GPU that the policy needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learners.deepspeed.engine import forget_partitioned_modules, partitioned_for_inference
from learners.deepspeed.sequence_parallel import sequence_group
from learners.language_model import LanguageModel
from learners.samples.batching import MicroBatch
from learners.settings import RankSettings


class ReferencePolicy:
    """A frozen language model: partitioned over the ranks at ZeRO 3, otherwise in host memory between its uses.

    Args:
        module: the model; its parameters are partitioned if the ZeRO stage of the settings is 3.
        settings: settings of the rank.
    """

    def __init__(self, module: PreTrainedModel, settings: RankSettings) -> None:
        self.module, self._device = module.requires_grad_(False), settings.device
        self._model: Any = LanguageModel(module, sequence_group(settings.learner.sequence_parallel)).eval()
        self._engine: Any = None
        if settings.learner.zero_stage == 3:
            self._model = self._engine = partitioned_for_inference(self._model, settings)
        else:
            self._keep_on_host()

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Return what `LanguageModel` returns. Collective at ZeRO 3."""
        outputs: tuple[Tensor, Tensor] = self._model(**inputs)
        return outputs

    @torch.no_grad()
    def states(self, batch: MicroBatch, places: Tensor) -> Tensor:
        """Return the hidden states at places of a micro-batch, from which `logits` follow. Not at ZeRO 3."""
        states: Tensor = self._model.states(batch.input_ids, places, batch.depths, batch.attention)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Return the [N, V] logits of hidden states. The model must be in use."""
        logits: Tensor = self._model.logits(states)
        return logits

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the model on the device in the body of the context."""
        on_host = [] if self._engine else [(each, each.data) for each in self.module.parameters()]
        for parameter, values in on_host:
            parameter.data = values.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            for parameter, values in on_host:  # nothing has changed, so nothing is copied back
                parameter.data = values

    def _keep_on_host(self) -> None:
        """Move the parameters to host memory, from which a GPU copies fast. Buffers stay on the device."""
        for parameter in self.module.parameters():
            if parameter.is_cuda:
                parameter.data = parameter.data.cpu().pin_memory()

    def destroy(self) -> None:
        """Free the memory, before another model is built."""
        if self._engine:
            self._engine.destroy()
            forget_partitioned_modules()
        self.module = self._model = self._engine = None
