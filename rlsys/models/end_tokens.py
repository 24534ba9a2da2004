"""Check the tokens that end a completion: the tokenizer must have them, and the model must have rows for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder


def check_end_tokens(model: ModelFolder, named: list[int]) -> tuple[str, ...]:
    """Raise if the tokenizer lacks its end token, or if an end token is beyond the vocabulary.

    Args:
        model: the model folder.
        named: end tokens in config.json.

    Returns:
        A line for the user about end tokens that the tokenizer lacks beside its own, if there are any.

    Raises:
        ConfigError: the message names the token and the file.
    """
    own, size, tokenizer = int(model.tokenizer.eos_token_id), model.vocabulary, model.tokenizer
    _refuse_unknown(model, own)
    tokens = dict.fromkeys([*model.end_token_ids, *named])
    source = {token: "config.json" if token in named else "generation_config.json" for token in tokens}
    for token in tokens:
        if size is not None and not 0 <= token < size:
            raise ConfigError(
                f"{model.path}: expected end tokens from 0 to {size - 1} (vocab_size of config.json), found {token} "
                f"in {'the tokenizer' if token == own else source[token]}; the files may belong to a model of another "
                "size"
            )
    unknown = [token for token in tokens if token >= 0 and tokenizer.convert_ids_to_tokens(token) is None]
    return tuple(
        f"{model.field} {model.path}: {source[token]} names the end token {token}, which the tokenizer lacks, so "
        "no completion ends with it; the files may belong to different models"
        for token in unknown
    )


def _refuse_unknown(model: ModelFolder, own: int) -> None:
    """Raise if no file of the tokenizer has its end token.

    transformers then gives the token a new id. A vocabulary with spare rows has room for it, but the model never
    learned it, so completions of the model would not end.
    """
    token = str(model.tokenizer.eos_token)
    if _is_in_vocabulary(model.tokenizer, token, own) or token in _added_tokens(model.path):
        return
    raise ConfigError(
        f"{model.path}: expected as eos_token a token that the tokenizer has, found {token!r} "
        f"({_origin(model.path)}), which is in no file of the tokenizer; set eos_token in tokenizer_config.json to the "
        "token that ends the completions of this model"
    )


def _is_in_vocabulary(tokenizer: Any, token: str, token_id: int) -> bool:
    """Return whether a token is in the vocabulary of a tokenizer, without the tokens that were added to it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
    if backend is None:
        return token_id < int(tokenizer.vocab_size)
    return backend.model.token_to_id(token) is not None


def _added_tokens(folder: Path) -> set[str]:
    """Return the tokens that the files of a tokenizer add to its vocabulary."""
    listed = _values(folder / "tokenizer.json").get("added_tokens") or []
    decoder = _values(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    entries = [*listed, *decoder.values()]
    named = {str(entry.get("content")) for entry in entries if isinstance(entry, dict)}
    return named | set(_values(folder / "added_tokens.json"))


def _origin(folder: Path) -> str:
    """Return the file that names the end token of a tokenizer, for messages."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if _values(folder / name).get("eos_token") is not None:
            return name
    return "the default of its class, because tokenizer_config.json has no eos_token"


def _values(path: Path) -> dict[str, Any]:
    """Return a JSON object whose form was checked before, or {} if there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
