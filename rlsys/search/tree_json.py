"""Trees as lines of JSON. Each line holds one tree, or the failure that stands in its place.

A line starts with `"format": 1`. The fields of `Tree` or `TreeFailure` follow under their own names; only a failure
has a `reason`. The dataclasses of `rlsys.trees` are the only declaration: the writer and the reader both follow their
fields. A field that does not take part in comparisons (`compare=False`) is left out, because timing decides it. A
field with the metadata OPTIONAL is left out if it has its default, so that files from before the field still read.
Lines are ASCII, so no reader splits a line at a separator inside a text. Each log-probability is the shortest decimal
that reads back as the same float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from dataclasses import Field as DataclassField
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import PydanticCustomError

from rlsys.config.wording import in_words
from rlsys.errors import DataError
from rlsys.trees import ThoughtNode, Tree, TreeFailure
from rlsys.types import OPTIONAL, Float32Array, Int32Array

FORMAT = 1
_SHOWN = 60


def tree_line(tree: Tree | TreeFailure) -> str:
    """Return the line of a tree without its line end. Equal trees give equal lines.

    Raises:
        ValueError: A number of the tree is not finite.
    """
    return json.dumps({"format": FORMAT, **_plain(tree)}, separators=(",", ":"), allow_nan=False)


def parse_line(text: str, where: str = "tree") -> Tree | TreeFailure:
    """Return the tree of a line.

    Args:
        text: The line.
        where: Position of the line, for the error message.

    Raises:
        DataError: The line is not exactly what `tree_line` writes. The message names the field, the expected and the
            given value.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        line_format = values.pop("format", None) if isinstance(values, dict) else values
        if type(line_format) is not int or line_format != FORMAT:
            raise ValueError(f"expected an object with format {FORMAT}, found {_short(line_format)}")
        tree = _adapter(TreeFailure if "reason" in values else Tree).validate_python(values)
        if isinstance(tree, Tree):
            _check_tree(tree)
    except ValidationError as error:
        raise DataError(f"{where}: {_first(error)}") from None
    except RecursionError:
        raise DataError(f"{where}: expected a tree, found JSON that is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return tree


def read_trees(path: Path) -> Iterator[Tree | TreeFailure]:
    """Yield the trees of a file in file order.

    Raises:
        DataError: The file cannot be read, or a line is not a tree. The message names the file and the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    raise DataError(f"{path}, line {number}: expected a line end, found the file cut off")
                yield parse_line(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


class _Line(BaseModel):
    """Strict model: all keys and no other, no conversion between types, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(_json_type(kind))


def _json_type(hint: Any) -> Any:
    """Return the pydantic type that reads the JSON form of a field type and converts it to that type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        build: Any = hint
        return Annotated[_line_model(hint), AfterValidator(lambda line: build(**dict(line)))]
    if hint == Int32Array:
        return Annotated[list[_TokenId], AfterValidator(lambda ids: np.array(ids, np.int32))]
    if hint == Float32Array:
        return Annotated[list[float], AfterValidator(_float32)]
    if origin is tuple:
        return Annotated[list[_json_type(arguments[0])], AfterValidator(tuple)]  # type: ignore[misc]
    if origin is Mapping:
        return dict[arguments[0], _json_type(arguments[1])]  # type: ignore[misc,valid-type]
    if origin is UnionType:
        return Union[tuple(map(_json_type, arguments))]  # noqa: UP007 - `|` cannot join types made at run time
    return hint


def _line_model(kind: Any) -> type[_Line]:
    """Return the pydantic model of a dataclass. Every field is required, except those with the metadata OPTIONAL."""
    hints = get_type_hints(kind, include_extras=True)
    types = {
        field.name: (_json_type(hints[field.name]), _default(field) if _is_optional(field) else ...)
        for field in fields(kind)
        if field.compare
    }
    model: type[_Line] = create_model(kind.__name__, __base__=_Line, **types)  # type: ignore[call-overload]
    return model


def _is_optional(field: DataclassField[Any]) -> bool:
    return OPTIONAL.items() <= field.metadata.items()


def _default(field: DataclassField[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


_TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _float32(numbers: list[float]) -> Float32Array:
    with np.errstate(over="ignore"):
        array = np.array(numbers, np.float32)
    if not np.isfinite(array).all():
        raise PydanticCustomError("float32", "expected numbers of float32")
    return array


def _check_tree(tree: Tree) -> None:
    """Raise ValueError if the tree has no node or the numbers of a node contradict each other."""
    if not tree.nodes:
        raise ValueError("nodes: expected at least 1 item, found none")
    for number, node in enumerate(tree.nodes):
        _check_node(number, node)


def _check_node(number: int, node: ThoughtNode) -> None:
    where, tokens = f"nodes.{number}", len(node.token_ids)
    if not (-1 if number == 0 else 0) <= node.parent <= number - 1:
        expected = "-1" if number == 0 else f"0 to {number - 1}"
        raise ValueError(f"{where}.parent: expected {expected}, found {node.parent}")
    if len(node.logprobs) != tokens:
        raise ValueError(f"{where}.logprobs: expected one for each of {tokens} token_ids, found {len(node.logprobs)}")
    if node.forced > tokens:
        raise ValueError(f"{where}.forced: expected at most the {tokens} token_ids, found {node.forced}")
    if (start := min((span.start for span in node.versions), default=0)) < 0:
        raise ValueError(f"{where}.versions: expected starts of 0 or more, found {start}")


def _plain(value: Any) -> Any:
    """Return the JSON form of a value, in an order that depends on the value alone."""
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind == "i" else [float(str(number)) for number in value]
    if is_dataclass(value):
        pairs = ((field, getattr(value, field.name)) for field in fields(value) if field.compare)
        return {field.name: _plain(held) for field, held in pairs if not _is_optional(field) or held != _default(field)}
    if isinstance(value, Mapping):
        return {name: _plain(value[name]) for name in sorted(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"expected every key once, found {name} twice")
        values[name] = value
    return values


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, found {text}")


def _first(error: ValidationError) -> str:
    """Return one line about the first of the errors that pydantic lists."""
    first = error.errors(include_url=False)[0]
    name, kind = ".".join(map(str, first["loc"])), first["type"]
    if kind == "missing":
        return f"{name}: expected this key, found none"
    if kind == "extra_forbidden":
        return f"{name}: expected no such key"
    return f"{name}: {in_words(first)}, found {_short(first['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
