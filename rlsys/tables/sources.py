"""Rows of a file or a Hugging Face data set, numbered as in the source."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlsys.earlier_runs import is_local, origin
from rlsys.errors import ConfigError, DataError
from rlsys.tables.files import Row, check_expansion, file_kind, file_rows

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
# Kinds of data sets whose files are tables or text. Some other kinds decode archives, which can contain pickles.
_TABLES = ("Arrow", "Csv", "Json", "Parquet", "Text")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Part of a Hugging Face data set. Files have no parts.

    Attributes:
        split: Split, such as train.
        subset: Configuration name of a data set that has several.
    """

    split: str = "train"
    subset: str | None = None


WHOLE = Part()


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
    rows = tuple(iterate_rows(path, Part(split=split, subset=subset), f"{field} {path}"))
    if not rows:
        raise DataError(f"{field} {path}: expected at least one row, found none")
    names = (name for row in rows if isinstance(row.values, dict) for name in row.values)
    return Source(path=path, columns=tuple(dict.fromkeys(names)), rows=rows)


def iterate_rows(path: str, part: Part, where: str) -> Iterator[Row]:
    """Yield the rows of a file or data set one after the other, as in `read_source`.

    Args:
        where: Name of the data set for error messages; it begins with the config field of the path.
    """
    if is_file_name(path):
        return file_rows(Path(path), where)
    return _hugging_face_rows(path, part, where)


def is_file_name(path: str) -> bool:
    """Return whether a path names one file instead of the folder or hub id of a data set."""
    return Path(path).is_file() or (file_kind(Path(path)) is not None and not Path(path).is_dir())


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


def _hugging_face_rows(path: str, part: Part, where: str) -> Iterator[Row]:
    if not Path(path).is_dir() and (is_local(path) or not _HUB_ID.fullmatch(path)):
        raise DataError(f"{where}: no such file or folder{origin(path)}")
    import datasets  # the import takes 0.7 s

    from rlsys.tables.arrow import short_float_columns, with_short_floats

    path = str(newest_snapshot(Path(path)))
    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(path)
        else:
            data = _load(path, part.subset, where)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        lines = str(_cause(error)).strip().splitlines() or [type(error).__name__]
        has_subsets = "Config name is missing" in lines[0]  # the second line has their names
        section = where.partition(".")[0]
        reason = f"set {section}.subset: {' '.join(lines[:2])}" if has_subsets else lines[0]
        raise DataError(f"{where}: not a readable data set: {reason}") from None
    if isinstance(data, dict):  # a DatasetDict, or the text files of each split
        if part.split not in data:
            raise DataError(f"{where}: has no split {part.split!r}; the splits are {', '.join(map(str, data))}")
        data = data[part.split]
    if isinstance(data, list):
        rows = (row for path in data for row in file_rows(path, where))
        yield from (replace(row, number=number, line=None) for number, row in enumerate(rows, 1))
        return
    short = short_float_columns(data.features.arrow_schema)
    for number, values in enumerate(data, 1):
        yield Row(number=number, values=with_short_floats(values, short))


def _cause(error: BaseException) -> BaseException:
    """Return the error that a chain of errors began with. The library hides it behind a general one."""
    return error if error.__cause__ is None else _cause(error.__cause__)


def _load(path: str, subset: str | None, where: str) -> Any:
    """Return the splits of a folder or hub id whose files are tables or text."""
    import datasets

    builder = datasets.load_dataset_builder(path, subset)
    kinds = [kind.__name__ for kind in type(builder).__mro__]
    if not set(kinds) & set(_TABLES):
        raise DataError(f"{where}: expected files of the kinds {', '.join(_TABLES)}, found {kinds[0]}")
    files = {str(name): [Path(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    local = [file for each in files.values() for file in each if file.is_file()]
    if "Csv" in kinds and local and len(local) == sum(map(len, files.values())):
        # As in a single file, every cell stays the text that it is: datasets would read 007 as 7.
        return files
    for file in local:
        check_expansion(file, f"{where}, file {file.name}")
    return datasets.load_dataset(path, subset)


def newest_snapshot(folder: Path) -> Path:
    """Return the newest snapshot of a repository in the hub's cache, and any other path unchanged."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    named = snapshots / main.read_text(encoding="utf-8").strip() if main.is_file() else snapshots
    if named != snapshots and named.is_dir():
        return named
    return max(snapshots.iterdir(), key=lambda each: each.stat().st_mtime, default=folder)
