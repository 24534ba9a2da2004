"""The keys of a config file, read from the schema: for `rlsys keys` and for the message about an unknown key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlsys.config import Config, Section


@dataclass(frozen=True, slots=True)
class Key:
    """One key with its dotted name. default: as it is written in YAML, "required" where there is none."""

    name: str
    type: str
    default: str
    meaning: str


def all_keys(section: type[Section] = Config, prefix: str = "", defaults: Section | None = None) -> list[Key]:
    """Keys in the order of the schema; those of alternative sections (task) one after the other.

    Args:
        defaults: an instance that holds the defaults where the schema around has its own for this section.
    """
    found = []
    for name, field in section.model_fields.items():
        full = f"{prefix}{name}"
        default = getattr(defaults, name) if defaults is not None else field.default
        sections = list(_sections(field.annotation))
        if not sections or type(None) in typing.get_args(field.annotation):
            found.append(Key(full, _type_name(field.annotation), _written(default), _meaning(name, field)))
        for inner in sections:
            found += all_keys(inner, f"{full}.", default if isinstance(default, inner) else None)
    return found


def suggestion(name: str) -> str:
    """What somebody who wrote an unknown key may have meant."""
    known = {key.name for key in all_keys()}
    if name in known:
        return "it belongs to another task.type; `rlsys keys task` shows all"
    sections = {known_name.rpartition(".")[0] for known_name in known} - {""}
    last = name.rpartition(".")[2]
    same = sorted(known_name for known_name in known if known_name.rpartition(".")[2] == last)
    close = same or difflib.get_close_matches(name, sorted(known | sections), n=1)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{meant}`rlsys keys` shows all"


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Section classes in an annotation such as `A`, `A | None` or `Annotated[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if argument is type(None) else _type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if issubclass(annotation, Section):
        return "section"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true | false"}[annotation.__name__]


def _written(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else f"{value}"


def _meaning(name: str, field: FieldInfo) -> str:
    if field.description is None and name == "type":
        return f"With `{field.default}`, the keys that follow."
    return field.description or ""
