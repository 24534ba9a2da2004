"""Files of a trained model: weights as a Hugging Face folder, and optimizer state by parameter name."""

from __future__ import annotations

import json
from pathlib import Path

from learners.deepspeed.collective_errors import fail_on_all_ranks
from learners.deepspeed.engine import MASTER, MOMENTS, TrainedModel
from learners.deepspeed.parameters import trained_parameters
from learners.deepspeed.tensor_files import read_tensors, write_tensors
from rlsys.errors import CheckpointError
from rlsys.models.adapters import ADAPTER_STEM


def save_model(model: TrainedModel, weights: Path, state: Path) -> None:
    """Write the weights, or the adapter, without the tokenizer, and the state of the optimizer. Collective.

    Args:
        model: policy or critic.
        weights: folder of the weights.
        state: folder of moments, master weights and the update counter.

    Raises:
        CheckpointError: on all ranks, if one cannot write.
    """
    writes, problem = model.settings.rank == 0, ""
    files = [(model.named_weights(), weights, ADAPTER_STEM if model.adapted else "model")]
    files += [(model.named_states(key), state, key) for key in _state_keys(model)]
    for tensors, folder, stem in files:
        try:
            write_tensors(tensors, folder, stem, writes and not problem)
        except CheckpointError as error:  # go on: gathering the other tensors needs every rank
            problem = problem or error.message
    with fail_on_all_ranks(CheckpointError, model.settings.device):
        if problem:
            raise CheckpointError(problem)
        if writes:
            model.saved_config.save_pretrained(weights)
            (state / "learner.json").write_text(json.dumps({"updates": model.updates}))


def restore_model(model: TrainedModel, state: Path | None) -> None:
    """Restore master weights, moments and counters that `save_model` wrote. Collective.

    Args:
        model: policy or critic, built from the weights of the same checkpoint.
        state: folder of the state; None to start at the first update.

    Raises:
        CheckpointError: on all ranks, if one cannot read the state.
    """
    updates = model.updates
    with fail_on_all_ranks(CheckpointError, model.settings.device):
        if state is not None:
            _restore_states(model, state)
            updates = int(json.loads((state / "learner.json").read_text())["updates"])
    model.set_updates(updates)


def _state_keys(model: TrainedModel) -> tuple[str, ...]:
    return MOMENTS if model.settings.learner.dtype == "fp32" else (*MOMENTS, MASTER)


def _restore_states(model: TrainedModel, folder: Path) -> None:
    parameters = dict(trained_parameters(model.module))
    for key in _state_keys(model):
        missing = set(parameters)
        for name, tensor in read_tensors(folder, key):
            if name not in missing:
                raise CheckpointError(f"{folder}: {key} has a tensor for {name}, which is not a parameter of the model")
            missing.discard(name)
            model.set_state(parameters[name], key, tensor)
        if missing:
            raise CheckpointError(f"{folder}: {key} lacks {sorted(missing)[:3]}")
