"""Compare the tensors of a model folder with those of the class that the learner trains. No values are read.

transformers loads the headers alone into a model without memory. So all its rules apply: renamed and fused tensors,
tied layers, and tensors that a class ignores.
"""

from __future__ import annotations

from typing import Any

from rlsys.errors import ConfigError
from rlsys.models.config_faults import keys_at_fault
from rlsys.models.folder import ModelFolder
from rlsys.models.loading import ignored_tensors, refuse_differences
from rlsys.models.weight_files import have_equal_values

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of tensors in safetensors files that the learner can train."""


def check_weight_shapes(model: ModelFolder) -> tuple[str, ...]:
    """Check that the learner has a class for a model, and that the weights fill exactly this class.

    Args:
        model: the model folder.

    Returns:
        A line for the user about tensors that are not loaded, if there are any.

    Raises:
        ConfigError: there is no such class, or tensors are missing, superfluous, or of another shape or type.
    """
    skeleton = refuse_other_tensors(model)
    _check_values(model, skeleton)
    ignored = ignored_tensors(skeleton, model.tensors)
    if not ignored:
        return ()
    return (
        f"{model.field} {model.path}: {len(ignored)} tensors are not loaded, because {type(skeleton).__name__} has no "
        f"use for them, the first: {ignored[0]}; exported policies do not have them",
    )


def refuse_other_tensors(model: ModelFolder) -> Any:
    """Return the model without values, or raise if its tensors are not those of the folder.

    Raises:
        ConfigError: see `check_weight_shapes`.
    """
    kind = _learner_class(model)
    _check_layers(model)
    try:
        skeleton, loaded = _load_headers(kind, model)
    except Exception as error:
        # The class computes sizes with the values of config.json. Whatever it raises is a fault of the folder.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        fault = keys_at_fault(model.path, error)
        reason = f"{fault} ({reason})" if fault else reason
        raise ConfigError(f"{model.path}: config.json does not describe a {kind.__name__}: {reason}") from error
    refuse_differences(str(model.path), loaded)
    return skeleton


def _check_layers(model: ModelFolder) -> None:
    """Raise if config.json has more layers than the folder has tensors, because building them could take hours."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(model.tensors):
        raise ConfigError(
            f"{model.path}: config.json and the weights belong to different models: num_hidden_layers is {layers}, and "
            f"the weights have only {len(model.tensors)} tensors; download both from one model"
        )


def _check_values(model: ModelFolder, skeleton: Any) -> None:
    """Raise if a weight is no floating-point number, or if tied tensors differ."""
    for name, _ in skeleton.named_parameters():
        dtype = model.tensors.get(name, {}).get("dtype")
        if dtype not in (None, *FLOATS):
            raise ConfigError(f"{model.path}: expected weights in fp32, bf16 or fp16, found tensor {name} of {dtype}")
    for tied, source in skeleton.all_tied_weights_keys.items():
        both = tied in model.tensors and source in model.tensors
        if both and not have_equal_values(model.path, tied, source):
            raise ConfigError(
                f"{model.path}: config.json ties {tied} to {source}, but their values differ; set tie_word_embeddings "
                f"to false, or take {tied} out of the weights"
            )


def _learner_class(model: ModelFolder) -> Any:
    """Return the class with which the learner loads a model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = model.config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{model.path}: model_type {config.model_type!r} is no causal language model of transformers")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    given = config.architectures or [kind.__name__]
    names = given if isinstance(given, list) else ()
    if kind.__name__.casefold() not in (str(name).casefold() for name in names):
        raise ConfigError(
            f"{model.path}: expected architectures [{kind.__name__!r}] in config.json, which is the causal language "
            f"model of model_type {config.model_type!r}, found {given!r}"
        )
    return kind


class _Header:
    """Stand-in for a tensor of a file: it has a shape, and becomes a tensor without values."""

    def __init__(self, shape: list[int]) -> None:
        self._shape = shape

    def __getitem__(self, _place: object) -> _Header:
        return self

    def to(self, device: object = None, dtype: Any = None) -> Any:
        import torch

        return torch.empty(self._shape, dtype=dtype, device="meta")

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return "F32"


def _load_headers(kind: Any, model: ModelFolder) -> tuple[Any, dict[str, Any]]:
    """Return a model of a class with the headers loaded, and the report of transformers on the load."""
    import torch
    from transformers.utils import logging

    def keep_empty(*_arguments: object, **_options: object) -> None:
        """Give no memory to missing tensors."""

    methods = dict.fromkeys(("_move_missing_keys_from_meta_to_device", "_initialize_missing_keys"), keep_empty)
    logging.disable_progress_bar()
    skeleton: Any = type(kind.__name__, (kind,), methods)
    loaded: tuple[Any, dict[str, Any]] = skeleton.from_pretrained(
        None,
        config=model.config,
        state_dict={name: _Header(entry["shape"]) for name, entry in model.tensors.items()},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return loaded
