"""Compare the tensors of a model folder with those of the class that the learner trains. No values are read.

transformers loads the headers alone into a model without memory. So all its rules apply: renamed and fused tensors,
tied layers, and tensors that a class ignores.
"""

from __future__ import annotations

import re
from typing import Any

from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder


def check_skeleton(model: ModelFolder) -> None:
    """Check that the learner has a class for a model, and that the weights fill exactly this class.

    Args:
        model: the model folder.

    Raises:
        ConfigError: there is no such class, or tensors are missing, superfluous or of another shape.
    """
    kind = _learner_class(model)
    try:
        loaded = _load_headers(kind, model)
    except Exception as error:
        # The class computes sizes with the values of config.json. Whatever it raises is a fault of the folder.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{model.path}: config.json does not describe a {kind.__name__}: {reason}") from error
    problems = _problems(model, loaded)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(
            f"{model.path}: config.json and the weights belong to different models: {problems[0]}{more}; download "
            "both from one model"
        )


def _learner_class(model: ModelFolder) -> Any:
    """Return the class with which the learner loads a model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = model.config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{model.path}: model_type {config.model_type!r} is no causal language model of transformers")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    given = config.architectures or [kind.__name__]
    if kind.__name__.casefold() not in (str(name).casefold() for name in given):
        raise ConfigError(
            f"{model.path}: expected architectures [{kind.__name__!r}] in config.json, which is the causal language "
            f"model of model_type {config.model_type!r}, found {given}"
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


def _load_headers(kind: Any, model: ModelFolder) -> dict[str, Any]:
    """Load the headers into a model of a class. Return the names of missing, unexpected and mismatched tensors."""
    import torch
    from transformers.utils import logging

    def keep_empty(*_arguments: object, **_options: object) -> None:
        """Give no memory to missing tensors."""

    methods = dict.fromkeys(("_move_missing_keys_from_meta_to_device", "_initialize_missing_keys"), keep_empty)
    logging.disable_progress_bar()
    skeleton: Any = type(kind.__name__, (kind,), methods)
    _, loaded = skeleton.from_pretrained(
        None,
        config=model.config,
        state_dict={name: _Header(entry["shape"]) for name, entry in model.tensors.items()},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return loaded


def _problems(model: ModelFolder, loaded: dict[str, Any]) -> list[str]:
    """Return what does not fit, the most telling first.

    Tensors of unknown modules are no problem here: some classes leave out parts that engines use or skip.
    """
    shapes = [
        f"tensor {name} has shape {list(stored)}, config.json makes it {list(expected)}"
        for name, stored, expected in sorted(loaded["mismatched_keys"])
    ]
    missing = [f"tensor {name} is missing" for name in sorted(loaded["missing_keys"])]
    modules = {_numberless(name.rpartition(".")[0]) for name in model.tensors.keys() - loaded["unexpected_keys"]}
    superfluous = [
        f"config.json has no place for tensor {name}"
        for name in sorted(loaded["unexpected_keys"])
        if _numberless(name.rpartition(".")[0]) in modules
    ]
    return [*shapes, *missing, *superfluous]


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
