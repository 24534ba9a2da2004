"""Turn the problems that pydantic finds in a config into messages: which key, what was expected, what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlsys.config.keys import sections_in, suggestion
from rlsys.config.schema import Config
from rlsys.config.section import NOT_A_TRUTH_VALUE, Section
from rlsys.config.wording import bound, close_name, expectation, names_in, shown, tag
from rlsys.plugins import PLUGIN_VALIDATOR, PluginName

SHOWN_PROBLEMS = 6
"""Problems that a message names; the rest is counted."""


def explain(error: ValidationError, source: str, overridden: Sequence[str] = ()) -> str:
    """Return one line about all problems of a config.

    Args:
        source: name of the file.
        overridden: dotted names of the keys that were given on the command line.
    """
    problems: dict[str, list[tuple[Any, Any]]] = {}
    for problem in error.errors():
        path, annotation = locate(problem["loc"])
        problems.setdefault(path, []).append((problem, annotation))
    inner = [path for path in problems if not any(other.startswith(f"{path}.") for other in problems)]
    given = {path: any(f"{path}.".startswith(f"{key}.") for key in overridden) for path in inner}
    lines = [
        f"{'on the command line' if given[path] else source}: {_explain(path, problems[path])}"
        for path in inner[:SHOWN_PROBLEMS]
    ]
    more = len(inner) - len(lines)
    return "; ".join([*lines, *([f"and {more} more"] if more else [])])


def locate(location: Sequence[int | str]) -> tuple[str, Any]:
    """Return the dotted name of the key at which pydantic found a problem, and its annotation.

    pydantic adds the chosen alternative of a union to the location, but it is no key of the file.
    """
    parts: list[str] = []
    annotation: Any = Config
    for position, part in enumerate(location):
        sections = _direct_sections(annotation)
        tagged = [section for section in sections if len(sections) > 1 and tag(section) == part]
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        entry = _entry(annotation, part)
        if tagged:
            annotation = tagged[0]
        elif fields:
            annotation = _annotation(fields[0])
            parts.append(str(part))
        elif entry is not None:
            annotation = entry
            parts.append(str(part))
        elif sections and position == len(location) - 1:  # an unknown key
            annotation = None
            parts.append(str(part))
    return ".".join(parts), annotation


def _annotation(field: FieldInfo) -> Any:
    """Return the annotation of a field; pydantic has split it from what makes a text the name of a plug-in."""
    return PluginName if PLUGIN_VALIDATOR in field.metadata else field.annotation


def _direct_sections(annotation: Any) -> list[type[Section]]:
    """Return the sections that a value of this annotation can be; those of the entries of a list are none."""
    return [] if _container(annotation) else list(sections_in(annotation))


def _container(annotation: Any) -> Any:
    """Return the list or mapping in an annotation such as `tuple[A, ...] | None`, or None."""
    if get_origin(annotation) in (tuple, dict):
        return annotation
    if get_origin(annotation) is Literal:
        return None
    return next((inner for inner in map(_container, get_args(annotation)) if inner), None)


def _entry(annotation: Any, part: int | str) -> Any:
    """Return the annotation of an entry of a list or mapping, or None."""
    container = _container(annotation)
    if container is None or isinstance(part, int) != (get_origin(container) is tuple):
        return None
    is_alternative = isinstance(part, str) and ("[" in part or part.startswith("constrained-"))
    return None if is_alternative else get_args(container)[1 if get_origin(container) is dict else 0]


def _explain(path: str, problems: Sequence[tuple[Any, Any]]) -> str:
    """Return the message about one key. A union gives a problem for each of its alternatives."""
    problem, annotation = problems[0]
    name = f"{path}: " if path else ""
    value = problem["input"]
    kind = problem["type"]
    if kind == NOT_A_TRUTH_VALUE:
        key = ".".join(filter(None, (path, problem["ctx"]["name"])))
        _, annotation = locate([*problem["loc"], problem["ctx"]["name"]])
        hint = "; YAML reads yes, no, on and off as true or false"
        return f"{key}: expected {expectation(annotation)}, found {problem['ctx']['value']}{hint}"
    if kind == "extra_forbidden":
        return f"{name}unknown key; {suggestion(path)}"
    if kind == "invalid_key":
        return f"{name}expected a text as the name of a key, found {value!r}; put it in quotes"
    if kind == "missing":
        return f"{name}missing; expected {expectation(annotation)}"
    if kind.startswith("union_tag"):
        return _wrong_type(path, value, annotation)
    if kind == "value_error" and len(problems) == 1:
        message = problem["msg"].removeprefix("Value error, ")
        is_value = not isinstance(value, Mapping | Section) and ", found" not in message
        return f"{name}{message}{f', found {shown(value)}' if is_value else ''}"
    return f"{name}expected {_expected(problems)}, found {shown(value)}{_hint(path, value, annotation)}"


def _expected(problems: Sequence[tuple[Any, Any]]) -> str:
    """Return what was expected, more exactly if only the bound of a value is broken."""
    bounds = [each for problem, _ in problems if (each := bound(problem))]
    return bounds[0] if len(bounds) == len(problems) else expectation(problems[0][1])


def _wrong_type(path: str, value: Any, annotation: Any) -> str:
    """Return the message about a section with alternatives whose `type` is missing or unknown."""
    names = [name for section in sections_in(annotation) if (name := tag(section))]
    given = value.get("type") if isinstance(value, Mapping) else value
    if isinstance(value, Mapping) and "type" not in value:
        return f"{path}.type: missing; expected one of {', '.join(names)}"
    return f"{path}.type: expected one of {', '.join(names)}, found {shown(given)}{close_name(given, names)}"


def _hint(path: str, value: Any, annotation: Any) -> str:
    """Return what to write instead, if the value shows what was meant."""
    container = _container(annotation)
    if isinstance(value, str) and (entry := _plugged(annotation, value)):
        return f"; {entry}"
    if isinstance(value, Mapping) and not _direct_sections(annotation) and get_origin(container) is not dict:
        return (
            "; put a text with braces in quotes" if annotation is not None and "text" in expectation(annotation) else ""
        )
    if get_origin(container) is tuple and isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"; a list is written [{value}]" if value != "" else ""
    if value is None and _direct_sections(annotation):
        is_required = path in Config.model_fields and Config.model_fields[path].is_required()
        return f"; {'' if is_required else 'leave the name of the section out, or '}write keys below it"
    return close_name(value, names_in(annotation))


def _plugged(annotation: Any, name: str) -> str:
    """Return how to name a function in a section, or list of sections, whose first key is `fn`; else ""."""
    container = _container(annotation)
    sections = _direct_sections(annotation) if container is None else list(sections_in(container))
    if not name or len(sections) != 1 or next(iter(sections[0].model_fields)) != "fn":
        return ""
    written = f"{{fn: {name}}}"
    return f"write {written}" if container is None else f"a list is written [{written}]"
