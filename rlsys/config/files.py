"""Read config files as strict YAML with `section.key=value` overrides, and write resolved configs.

Unknown and duplicate keys are errors. Every error is one line that names the field.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlsys.config.keys import schema_path, suggestion, takes_text
from rlsys.config.schema import Config
from rlsys.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys and YAML aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes text which the loader would read as a number."""


# YAML 1.1 reads `1e-4` as a string, but users mean a number.
for _side in (_UniqueKeyLoader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text.

    Args:
        source: name of the text, for messages.
    Raises:
        ConfigError: the text is not valid; names the source and the line.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader subclass
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}: {problem}") from None
    except (ValueError, RecursionError) as error:  # an invalid date such as 2026-13-45; very deep nesting
        raise ConfigError(f"{source}: {error}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply `a.b.c=value` to nested dictionaries. Values of text keys stay as they are, others are YAML.

    YAML would read a template such as {question} as a mapping, 007 as a number, and leave out what follows a #. The
    value of a text key is therefore read as YAML only if it is in quotes, or null.

    Raises:
        ConfigError: the override is not valid.
    """
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r}: expected section.key=value")
    section = values
    for key in keys[:-1]:
        child = section.get(key)
        if child is None:
            child = section[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {key} is not a section")
        section = child
    is_plain_text = takes_text(keys, values) and not _is_quoted(text) and text.strip().lower() not in _NULL
    section[keys[-1]] = text.strip() if is_plain_text else parse_yaml(text, f"override {override!r}")


_NULL = ("", "~", "null")


def _is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the validated config of a file with overrides.

    Raises:
        ConfigError: names the field and the value of every problem.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Return the validated config of nested dictionaries.

    Args:
        source: name of the file, for messages.
    Raises:
        ConfigError: names the field and the value of every problem.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(source, problem) for problem in error.errors())) from None


def _explain(source: str, problem: Any) -> str:
    where = schema_path(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{source}: {where}: unknown key; {suggestion(where)}"
    is_mapping = isinstance(problem["input"], dict)
    found_value = "" if is_mapping else f", found {problem['input']!r}"
    if is_mapping and problem["type"] == "string_type":  # YAML reads {question} as one
        found_value = ", found a mapping; put a text with braces in quotes"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{source}: {where + ': ' if where else ''}{message}{found_value}"


def dump_config(config: Config) -> str:
    """Return a resolved config as YAML, which `load_config` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=100)


FIXED_FIELDS = (
    *("run.seed", "stages", "model", "task", "learner.dtype"),
    *("environment.fn", "environment.stop", "environment.role"),
)
"""Sections and fields that a resume must not change: they define the experiment."""


def fixed_fields(config: Config) -> dict[str, Any]:
    """Return the values that a resume must not change, by dotted name of the innermost field."""
    return select_fields(flat_fields(config.model_dump(mode="json")), FIXED_FIELDS)


def flat_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted name of the innermost field."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        fields |= flat_fields(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return fields


def select_fields(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the fields that equal one of the names or are inside one of them."""
    return {
        field: value
        for field, value in fields.items()
        if any(field == name or field.startswith(f"{name}.") for name in names)
    }
