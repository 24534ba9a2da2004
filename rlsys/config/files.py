"""Read config files as strict YAML with `section.key=value` overrides, and write resolved configs.

Unknown and duplicate keys are errors. Every error is one line that names the field.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlsys.config.keys import takes_text
from rlsys.config.messages import explain
from rlsys.config.schema import Config
from rlsys.errors import ConfigError

DATA_FILE = re.compile(r"\.(jsonl|csv|tsv|parquet|arrow|safetensors)(\.(gz|bz2|xz|zst|lz4))?$", re.IGNORECASE)
"""Names of files that hold rows or weights. A line of JSON would be read as YAML."""
LARGEST = 4 * 2**20
"""Bytes of the largest file that is read as a config."""


_PLAIN = {
    "<block end>": "this line does not fit those above it; check the indentation",
    "mapping values are not allowed here": "no second colon can stand here; check the indentation of this line and the "
    "one above, and put a text with a colon in quotes",
    "could not find expected ':'": "expected `key: value`, found no colon; check the indentation, and the line above",
}
"""Words of the parser in a problem, and what to tell the user in their place."""


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
        problem = next((plain for words, plain in _PLAIN.items() if words in problem), problem)
        lines = text.splitlines()
        line = lines[mark.line] if mark and mark.line < len(lines) else ""  # a text may end too early
        is_tab = "\t" in line[: len(line) - len(line.lstrip())]
        hint = "; a tab stands at the beginning of this line: indent with spaces" if is_tab else ""
        raise ConfigError(f"{where}: {problem}{hint}") from None
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
    try:
        section[keys[-1]] = text.strip() if is_plain_text else parse_yaml(text, f"override {override!r}")
    except ConfigError as error:
        raise ConfigError(
            f"{error.message}; if the value is a text, put it in quotes inside of those of the shell"
        ) from None


_NULL = ("", "~", "null")


def _is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the validated config of a file with overrides.

    Raises:
        ConfigError: names the field and the value of every problem.
    """
    values = read_sections(path)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, str(path), [override.partition("=")[0].strip() for override in overrides])


def read_sections(path: str | Path) -> dict[str, Any]:
    """Return the sections of a config file, as they are written.

    Raises:
        ConfigError: the path is no text file of YAML with sections.
    """
    expected, file = f"{path}: expected a config, a YAML file with sections", Path(path)
    if file.is_dir():
        inside = f"; did you mean {file / 'config.yaml'}?" if (file / "config.yaml").is_file() else ""
        raise ConfigError(f"{expected}, found a folder{inside}")
    if DATA_FILE.search(file.name):
        raise ConfigError(f"{expected}, found the data file {file.name}; in a config, task.path names a data file")
    try:
        if file.stat().st_size > LARGEST:
            raise ConfigError(f"{expected}, found a file of {file.stat().st_size:,} bytes")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, _neighbours(file), n=1)
        meant = f"; did you mean {file.with_name(near[0])}?" if near else ""
        raise ConfigError(f"{path}: cannot be read: there is no such file{meant}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{expected}, found bytes that are no text in UTF-8") from None
    except (OSError, ValueError) as error:  # no permission; a NUL in the name
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if "\0" in text:
        raise ConfigError(f"{expected}, found bytes that are no text")
    try:
        values = parse_yaml(text, str(path))
    except ConfigError as error:
        if file.suffix in (".yaml", ".yml", ""):
            raise
        raise ConfigError(f"{path}: not a config; expected a YAML file with sections ({error.message})") from None
    if not isinstance(values, dict):
        kinds = {"NoneType": "nothing", "list": "a list", "str": "a text"}
        kind = kinds.get(type(values).__name__, "a single value")
        raise ConfigError(f"{path}: expected a mapping of sections, found {kind}")
    if values and not any(key in Config.model_fields or key == "type" for key in values):  # a task file may have a type
        raise ConfigError(f"{expected}, found none of {', '.join([*Config.model_fields][:6])}, ... in it")
    return values


def _neighbours(file: Path) -> list[str]:
    try:
        return [each.name for each in file.parent.iterdir() if each.suffix in (".yaml", ".yml")]
    except OSError:
        return []


def parse_config(values: dict[str, Any], source: str, overridden: Sequence[str] = ()) -> Config:
    """Return the validated config of nested dictionaries.

    Args:
        source: name of the file, for messages.
        overridden: dotted names of the keys that were given on the command line.
    Raises:
        ConfigError: names the field and the value of every problem.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source, overridden)) from None


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
