"""List the keys of a config file from the schema, for `rlsys keys` and for messages about unknown keys."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlsys.config.other_names import OTHER_NAMES
from rlsys.config.schema import Config
from rlsys.config.section import Section
from rlsys.config.wording import tag


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a config file.

    Attributes:
        name: dotted name.
        default: the default as it is written in YAML, or "required".
    """

    name: str
    type: str
    default: str
    meaning: str


def all_keys(section: type[Section] = Config, prefix: str = "", defaults: Section | None = None) -> list[Key]:
    """Return the keys in the order of the schema. The keys of alternative sections, such as task, follow one another.

    In a dotted name, NAME and NUMBER stand for the name and the index of an entry that the user adds.

    Args:
        section: the section to list.
        prefix: dotted name of the section, with a final dot.
        defaults: the section's defaults, if the enclosing schema overrides them.
    """
    keys = []
    for name, field in section.model_fields.items():
        full = f"{prefix}{name}"
        default = getattr(defaults, name) if defaults is not None else field.get_default(call_default_factory=True)
        sections = list(sections_in(field.annotation))
        entry = _entry(field.annotation)
        if not sections or entry or type(None) in typing.get_args(field.annotation):
            keys.append(Key(full, _type_name(field.annotation), _written(default), _meaning(name, field)))
        for inner in sections:
            keys += all_keys(inner, f"{full}{entry}.", default if isinstance(default, inner) else None)
    return keys


def suggestion(name: str) -> str:
    """Return a hint for a user who wrote an unknown key."""
    known = {_with_entries(key.name, name): key.name for key in all_keys()}
    section = name.rpartition(".")[0]
    if name in known:
        return f"it belongs to another {section}.type; `rlsys keys {section}` shows all"
    sections = {known_name.rpartition(".")[0]: full.rpartition(".")[0] for known_name, full in known.items()}
    sections.pop("", None)
    last = name.rpartition(".")[2]
    same = sorted(known_name for known_name in known if known_name.rpartition(".")[2] == last)
    elsewhere = [OTHER_NAMES[last]] if last in OTHER_NAMES else []
    close = [*elsewhere, *same] or difflib.get_close_matches(name, sorted({*known, *sections} - {section}), n=1)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    command = f"rlsys keys {sections[section]}" if section in sections and not close else "rlsys keys"
    return f"{meant}`{command}` shows all"


def _with_entries(known: str, name: str) -> str:
    """Return a name of `all_keys` with the entries that a user's name has in place of NAME and NUMBER."""
    parts, given = known.split("."), name.split(".")
    for place, part in enumerate(parts[: len(given)]):
        if part == "NAME" or (part == "NUMBER" and given[place].isdigit()):
            parts[place] = given[place]
        if parts[place] != given[place]:
            break
    return ".".join(parts)


def takes_text(keys: Sequence[str], values: Mapping[str, Any]) -> bool:
    """Return whether a key of the schema takes a text, and nothing else but null.

    Args:
        keys: parts of the dotted name of the key.
        values: the config so far. The `type` of a section with alternatives decides between them.
    """
    annotation: Any = Config
    for key in keys:
        if typing.get_origin(annotation) is dict:  # sections by names that the user gives
            annotation = typing.get_args(annotation)[1]
        else:
            sections = _chosen(list(sections_in(annotation)), values)
            fields = [section.model_fields[key].annotation for section in sections if key in section.model_fields]
            if not fields:
                return False
            annotation = typing.Union[tuple(fields)]  # noqa: UP007 - `|` cannot join types made at run time
        inner = values.get(key)
        values = inner if isinstance(inner, Mapping) else {}
    return not any(sections_in(annotation)) and _type_name(annotation).removesuffix(" | null") == "text"


def _chosen(sections: list[type[Section]], values: Mapping[str, Any]) -> list[type[Section]]:
    """Return the alternative sections with the `type` that is given, or all."""
    chosen = [section for section in sections if tag(section) is not None and tag(section) == values.get("type")]
    return chosen or sections


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the section classes in an annotation such as `A`, `A | None` or `Annotated[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from sections_in(argument)


def _entry(annotation: Any) -> str:
    """Return the placeholder between the name of a mapping or list of sections and the keys of an entry."""
    return {dict: ".NAME", tuple: ".NUMBER"}.get(typing.get_origin(annotation), "")


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if argument is type(None) else _type_name(argument) for argument in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"{{name: {_type_name(arguments[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true | false", "Any": "value"}[
        annotation.__name__
    ]


def _written(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Section):
        return _written(dict(value))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_written(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, str) and value.startswith("{"):
        return f'"{value}"'
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, tuple) else f"{value}"


def _meaning(name: str, field: FieldInfo) -> str:
    if field.description is None and name == "type":
        return f"With `{typing.get_args(field.annotation)[0]}`, the keys that follow."
    return " ".join((field.description or "").split())
