"""Say in plain words what a type of a config key expects, and what a value is."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from rlsys.config.section import Section
from rlsys.plugins import PluginName

SHOWN = 80
"""Characters of a value that a message shows."""
MEANT = {"gpu": "cuda", "float32": "fp32", "float": "fp32", "bfloat16": "bf16"}
"""Names that other programs have for a value here."""
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def expectation(annotation: Any, item: bool = True) -> str:
    """Return what an annotation accepts, as the end of a sentence that begins with "expected".

    Args:
        annotation: annotation of a field.
        item: whether to say what the entries of a list are.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation == PluginName:
        return "`module:name` or `file.py:name` of your own"
    if origin is typing.Annotated:
        return expectation(arguments[0], item)
    if origin is Literal:
        return listed(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, item)
    if origin is tuple:
        return f"a list, each entry {expectation(arguments[0])}" if item else "a list"
    if origin is dict:
        return "a section of names and their values"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a section with keys such as {', '.join([*annotation.model_fields][:4])}"
    return _WORDS.get(annotation, "a value")


def listed(names: Iterable[str]) -> str:
    """Return names as a choice."""
    names = list(names)
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _union(arguments: Sequence[Any], item: bool) -> str:
    sections = [each for each in arguments if isinstance(each, type) and issubclass(each, Section)]
    if len(sections) > 1:
        return f"a section with type: {listed(map(str, filter(None, map(tag, sections))))}"
    ordered = sorted(arguments, key=lambda each: each is type(None))
    return ", or ".join(expectation(each, item) for each in ordered)


def tag(section: type[Section]) -> str | None:
    """Return the value of `type` that chooses an alternative section."""
    field = section.model_fields.get("type")
    tags = get_args(field.annotation) if field is not None else ()
    return str(tags[0]) if len(tags) == 1 else None


def names_in(annotation: Any) -> list[str]:
    """Return the names that an annotation accepts, also those of alternative sections."""
    if get_origin(annotation) is Literal:
        return [each for each in get_args(annotation) if isinstance(each, str)]
    return [name for each in get_args(annotation) for name in names_in(each)]


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return f"a section with the keys {', '.join(map(str, value))}"[:SHOWN] if value else "an empty section"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def bound(problem: Mapping[str, Any]) -> str | None:
    """Return the bound that a value of the right type breaks, or None if the problem is another one."""
    limits = problem.get("ctx", {})
    match problem["type"]:
        case "greater_than_equal":
            return f"at least {limits['ge']:g}"
        case "greater_than":
            return f"more than {limits['gt']:g}"
        case "less_than_equal":
            return f"at most {limits['le']:g}"
        case "less_than":
            return f"less than {limits['lt']:g}"
        case "finite_number":
            return "a finite number"
        case "string_too_short":
            return "a text that is not empty"
        case "too_short":
            return "at least one entry"
        case "string_pattern_mismatch":
            return f"a text of the form {limits['pattern'].strip('^$')}"
        case _:
            return None


def in_words(problem: Mapping[str, Any]) -> str:
    """Return what a value should have been, by the problem alone, without the annotation of a field."""
    kinds = {"int": "a whole number", "float": "a number", "string": "a text", "bool": "true or false"}
    kinds |= {"list": "a list", "tuple": "a list", "dict": "a mapping", "model": "a mapping", "dataclass": "a mapping"}
    kind = str(problem["type"]).partition("_")[0]
    return f"expected {words}" if (words := bound(problem) or kinds.get(kind)) else str(problem["msg"])


def close_name(value: Any, names: Sequence[str]) -> str:
    """Return a hint for a misspelt name, or ""."""
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    close = [MEANT[value]] if isinstance(value, str) and MEANT.get(value) in names else close
    return f"; did you mean {close[0]}?" if close else ""
