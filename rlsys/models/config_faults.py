"""Find the keys of config.json that an error of transformers is about, because many such errors name no key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_ACTIVATION = re.compile(r"(^|_)act(ivation)?(_|$)")
_SIZE = re.compile(r"^num_|^n_|^head_dim$|_(size|heads|layers|dim)$")
"""Keys of sizes that a model divides by, or makes tensors of."""
_ROPE = ("rope_scaling", "rope_parameters")
_NAMED_ELSEWHERE = {"model_type", "architectures", "transformers_version"}
_DTYPES = ("bfloat16", "float16", "float32")


def keys_at_fault(folder: Path, error: BaseException) -> str:
    """Return a clause about the keys of config.json that an error is about, "" if none is known.

    An error that quotes a text is about the keys with this text as their value. Any other one is about sizes below 1.

    Args:
        folder: the model folder; its config.json is a JSON object.
        error: error that a class of transformers raised for the values in this file.
    """
    values = list(_values(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    message = str(error)
    clauses = [
        f"{key} is {value!r}{_allowed(key)}"
        for key, value in values
        if isinstance(value, str) and value and repr(value) in message and key not in _NAMED_ELSEWHERE
    ]
    if not clauses:
        clauses = [
            f"{key} is {value}, expected 1 or more"
            for key, value in values
            if type(value) is int and value < 1 and _SIZE.search(key.rpartition(".")[2])
        ]
    return "; ".join(clauses)


def _values(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Return the keys and values of a config and of the configs inside it; a key inside is "config.key"."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def _allowed(key: str) -> str:
    """Return the clause with the values that transformers has for a key, "" if it has no list of them."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    outer, _, name = key.rpartition(".")
    allowed: Iterable[str] = ()
    if _ACTIVATION.search(name):
        allowed = ACT2FN
    elif name in ("rope_type", "type") and any(rope in outer.split(".") for rope in _ROPE):
        allowed = {"default", *ROPE_INIT_FUNCTIONS}
    elif name in ("dtype", "torch_dtype"):
        allowed = _DTYPES
    names = sorted(allowed)
    return f", expected one of {', '.join(names)}" if names else ""
