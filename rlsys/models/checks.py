"""Judge a model folder before anything starts, from its JSON files and the headers of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlsys.errors import ConfigError
from rlsys.models.chat import CheckedEncoder, named_tokens
from rlsys.models.chat_template import template_note
from rlsys.models.end_tokens import check_end_tokens
from rlsys.models.folder import ModelFolder
from rlsys.models.weight_shapes import check_weight_shapes

PROBE = "What is 12 + 7? Write the sum."
"""A question that every chat template must be able to render."""

EXPERTS = re.compile(r"(^|_)(n|num)_([a-z]+_)?experts$")
"""Keys of a config that count experts: num_experts, num_local_experts, n_routed_experts, moe_num_experts."""

QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|g_idx|absmax|quant_state\..*|weight_scale(_inv)?|weight_packed)$")
"""Names of tensors that only quantised weights have."""

QUANTIZED_KEYS = ("quantization_config", "compression_config")
"""Keys of a config that describe quantised weights."""

POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Keys of a config that limit the length of a sequence; the smallest value counts."""

SCALED_ALREADY = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
"""Kinds of rotary positions whose scaling max_position_embeddings already includes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Use of a model by a command.

    Attributes:
        longest: number of tokens of the longest sequence.
        longest_field: the config field that holds `longest`.
        trained: whether the learner trains the model and publishes its weights.
        held: whether the learner holds the model, and does not train it.
    """

    longest: int
    longest_field: str
    trained: bool = False
    held: bool = False


def check_model(model: ModelFolder, use: Use) -> tuple[str, ...]:
    """Refuse a model folder that would fail later. Return notes for the user.

    Raises:
        ConfigError: one line that begins with the config field of the model.
    """
    try:
        return _check(model, use)
    except ConfigError as error:
        named = error.message.startswith((model.field, use.longest_field))
        raise ConfigError(error.message if named else f"{model.field} {error.message}") from error


def _check(model: ModelFolder, use: Use) -> tuple[str, ...]:
    named = named_tokens(model.path / "config.json")
    _ = model.tensors  # raises if a file is missing
    notes: tuple[str, ...] = ()
    if use.trained:
        refuse_quantized(model)
        refuse_experts(model)
        check_padding(model, named["pad_token_id"])
        notes = check_weight_shapes(model)
    elif use.held:
        refuse_quantized(model)  # raises if transformers does not know the kind of model
        notes = check_weight_shapes(model)
    elif model.vocabulary is None:
        return ()  # the engine may know a kind of model that transformers does not
    check_positions(model, use)
    notes += check_end_tokens(model, named["eos_token_id"])
    CheckedEncoder(model.tokenizer, model.vocabulary).prompt(PROBE)
    note = template_note(model.tokenizer, PROBE)
    return (*notes, f"{model.field} {model.path}: {note}") if note else notes


def refuse_quantized(model: ModelFolder) -> None:
    """Raise if the weights are quantised, because the learner needs their values.

    Raises:
        ConfigError: config.json or a tensor says so.
    """
    values = dict(_items(model.config.to_dict()))
    key = next((key for key in QUANTIZED_KEYS if values.get(key)), None)
    tensor = next(
        (name for name, entry in model.tensors.items() if QUANTIZED.search(name) or _is_packed(entry["dtype"])), None
    )
    if key or tensor:
        sign = f"{key} in config.json ({values[key].get('quant_method')})" if key else f"tensor {tensor}"
        raise ConfigError(
            f"{model.path}: expected weights in fp32, bf16 or fp16, found quantised ones: {sign}; choose the model "
            "that was not quantised"
        )


def _is_packed(dtype: str) -> bool:
    return dtype.startswith(("F8", "F6_", "F4", "I8", "I4"))


def refuse_experts(model: ModelFolder) -> None:
    """Raise if the model has a mixture of experts, whose published weights an engine loads wrongly.

    Raises:
        ConfigError: config.json counts experts, or a tensor belongs to one.
    """
    counts = (
        f"{key} {value}"
        for key, value in _items(model.config.to_dict())
        if EXPERTS.search(key) and isinstance(value, int) and value > 1
    )
    tensors = (f"tensor {name}" for name in model.tensors if re.search(r"\bexperts?\b", name))
    if sign := next(counts, None) or next(tensors, None):
        raise ConfigError(
            f"{model.path}: mixture-of-experts models cannot be trained, because the engine computes something else "
            f"after a publish ({sign}); choose a dense model. search.model and search.reviewer may have experts"
        )


def _items(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the keys and values of a config and of the configs inside it."""
    for key, value in values.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _items(value)


def check_positions(model: ModelFolder, use: Use) -> None:
    """Raise if a sequence may have more tokens than the model has positions. The rules are those of the engine.

    Raises:
        ConfigError: the message names both limits.
    """
    text = model.config.get_text_config()
    limits = {key: value for key in POSITIONS if isinstance(value := getattr(text, key, None), int | float)}
    if isinstance(own := getattr(text, "model_max_length", None), int | float):
        limits = {"model_max_length": own}
    if not limits:
        return
    key = min(limits, key=lambda name: limits[name])
    limit = limits[key] * _rotary_factor(text)
    if use.longest > limit:
        raise ConfigError(
            f"{use.longest_field} {use.longest} exceeds the {limit:g} positions of the model "
            f"({model.path / 'config.json'}: {key} {limits[key]}); lower the former, or choose another model"
        )


def _rotary_factor(text_config: Any) -> float:
    """Return the factor by which scaled rotary positions exceed the limit in the config."""
    if "gemma3" in text_config.model_type:
        return 1.0
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    factors = [kind.get("factor") or 1.0 for kind in kinds if kind.get("rope_type") not in SCALED_ALREADY]
    return float(factors[-1]) if factors else 1.0


def check_padding(model: ModelFolder, named: list[int]) -> None:
    """Raise if the padding token in config.json is beyond the vocabulary, because the embedding has no row for it.

    Args:
        model: the model folder.
        named: padding tokens in config.json.

    Raises:
        ConfigError: the message names the token.
    """
    size = model.vocabulary
    for token in named:
        if size is not None and token >= size:
            raise ConfigError(
                f"{model.path}: expected a pad_token_id below {size} (vocab_size) in config.json, found {token}; set "
                "it to a token of the tokenizer, or to null"
            )
