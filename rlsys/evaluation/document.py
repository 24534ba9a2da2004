"""The parts of an output file: its results, with a title, and a letter for each model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any


def results_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the results of an output file, which is itself one if there is one model and one task."""
    return list(document.get("results", [document]))


def is_document(content: bytes) -> bool:
    """Return whether the content of a file is that of an output file of `rlsys evaluate`."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return False
    results = document.get("results", [document]) if isinstance(document, dict) else None
    return isinstance(results, list) and bool(results) and all(map(_is_result, results))


def _is_result(value: Any) -> bool:
    """Return whether a value has the keys by which a result of `rlsys evaluate` is known."""
    model = value.get("model") if isinstance(value, dict) else None
    names = [model.get("name"), model.get("weights"), value.get("task")] if isinstance(model, dict) else []
    return bool(names) and all(isinstance(name, str) for name in names) and isinstance(value.get("problems"), int)


def letters_of(document: Mapping[str, Any]) -> dict[str, str]:
    """Return a short name for each model, by its name: A, B, C and so on."""
    names = list(dict.fromkeys(result["model"]["name"] for result in results_of(document)))
    return {name: ascii_uppercase[n] if n < len(ascii_uppercase) else str(n + 1) for n, name in enumerate(names)}


def title_of(result: Mapping[str, Any]) -> str:
    """Return the task of a result, with the numbers of its problems and samples."""
    samples = f", {result['samples']} samples each" if result["samples"] else ""
    return f"{result['task']}: {result['problems']} problems{samples}"
