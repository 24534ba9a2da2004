"""Rows of a JSONL file, a Parquet file or a Hugging Face data set, numbered as in the source."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError, DataError

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
# Kinds of data sets whose files are tables or text. Some other kinds decode archives, which can contain pickles.
_TABLES = ("Arrow", "Csv", "Json", "Parquet", "Text")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a source.

    Attributes:
        number: Line number (JSONL) or row number, from 1.
        values: Values by column, or the reason why the row cannot be read.
    """

    number: int
    values: dict[str, Any] | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """All rows of a data set.

    Attributes:
        path: Path with its variables replaced.
        columns: Columns that at least one row has.
        rows: Rows in the order of the source.
    """

    path: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_source(path: str, split: str, field: str, subset: str | None = None) -> Source:
    """Read all rows of a file or data set.

    Args:
        path: Path or hub id as in the config; see `expand`.
        split: Split of a Hugging Face data set; files have no splits.
        field: Config field that names the path, for error messages.
        subset: Configuration name of a Hugging Face data set that has several.

    Raises:
        ConfigError: An environment variable is not set.
        DataError: The data set is missing, not readable, or empty.
    """
    path = expand(path, field)
    where = f"{field} {path}"
    if Path(path).is_file() or path.endswith((".jsonl", ".json", ".parquet")):
        columns, rows = _read_file(Path(path), where)
    else:
        columns, rows = _read_hugging_face(path, split, subset, where)
    if not rows:
        raise DataError(f"{where}: expected at least one row, found none")
    return Source(path=path, columns=columns, rows=tuple(rows))


def expand(path: str, field: str) -> str:
    """Replace environment variables (`${NAME}` or `$NAME`) and a leading `~` in a path.

    Raises:
        ConfigError: An environment variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"{field} {path}: the environment variable {name} is not set; set it or change {field}")
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(value, path))


def _read_file(path: Path, where: str) -> tuple[tuple[str, ...], list[Row]]:
    if not path.is_file():
        raise DataError(f"{where}: no such file")
    if path.suffix == ".parquet":
        return _read_parquet(path, where)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from None
    rows = [Row(number=number, values=json_object(line)) for number, line in enumerate(lines, 1) if line.strip()]
    names = (name for row in rows if isinstance(row.values, dict) for name in row.values)
    return tuple(dict.fromkeys(names)), rows


def json_object(line: bytes) -> dict[str, Any] | str:
    """Return the object of a line of JSON, or the reason why it cannot be read."""
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError:
        return "not UTF-8"
    except DataError as error:
        return error.message
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return value if isinstance(value, dict) else f"expected a JSON object, found {type(value).__name__}"


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded. A text from JSON can have half a surrogate pair."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise DataError(f"column {repeated}: expected it once in a row, found it twice")
    return values


def _read_parquet(path: Path, where: str) -> tuple[tuple[str, ...], list[Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        refuse_repeats(pyarrow.parquet.read_schema(path).names, where)  # read_table does not name the column
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{where}: not a readable Parquet file: {first_line(error)}") from None
    return tuple(table.column_names), _numbered(table.to_pylist())


def refuse_repeats(columns: Sequence[str], where: str) -> None:
    """Raise DataError if a Parquet file has two columns with the same name."""
    for name, times in Counter(columns).items():
        if times > 1:
            raise DataError(f"{where}, column {name}: expected it once, found it {times} times")


def _read_hugging_face(path: str, split: str, subset: str | None, where: str) -> tuple[tuple[str, ...], list[Row]]:
    if not Path(path).is_dir() and not _HUB_ID.fullmatch(path):
        raise DataError(f"{where}: no such file or folder")
    import datasets  # the import takes 0.7 s

    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(path)
        else:
            kinds = [kind.__name__ for kind in type(datasets.load_dataset_builder(path, subset)).__mro__]
            if not set(kinds) & set(_TABLES):
                raise DataError(f"{where}: expected files of the kinds {', '.join(_TABLES)}, found {kinds[0]}")
            data = datasets.load_dataset(path, subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        has_subsets = "Config name is missing" in lines[0]  # the second line has their names
        reason = f"set task.subset: {' '.join(lines[:2])}" if has_subsets else lines[0]
        raise DataError(f"{where}: not a readable data set: {reason}") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"{where}: has no split {split!r}; the splits are {', '.join(map(str, data))}")
        data = data[split]
    return tuple(data.column_names), _numbered(data)


def _numbered(values: Iterable[dict[str, Any]]) -> list[Row]:
    return [Row(number=number, values=dict(value)) for number, value in enumerate(values, 1)]


def first_line(error: Exception) -> str:
    """Return the first line of an error message, or the name of the error if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
