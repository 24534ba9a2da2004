"""Rows of one file: JSON lines, a JSON array, CSV, TSV, Parquet or Arrow, each also compressed."""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlsys.earlier_runs import origin
from rlsys.errors import DataError
from rlsys.files import is_lfs_pointer
from rlsys.tables.compression import COMPRESSED, ROW_BYTES, Expansion, is_compressed, open_compressed

_KINDS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip


# A byte that is not UTF-8, as `surrogateescape` keeps it in a text, as `repr` shows that, and how messages show it.
_ESCAPED_BYTE, _SHOWN_BYTE, _BYTE = re.compile("[\udc80-\udcff]"), re.compile(r"\\udc([89a-f][0-9a-f])"), r"\\x\1"

MAX_CHUNK = 2**20
"""Bytes that are read at once from a file whose content is not kept."""
READ_KINDS = f"{', '.join(_KINDS)} (also compressed: {', '.join(COMPRESSED)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a source.

    Attributes:
        number: Line number (JSON lines) or row number, from 1.
        values: Values by column, or the reason why the row cannot be read.
        line: Line of the file at which the row begins; None where a row is no line.
    """

    number: int
    values: dict[str, Any] | str
    line: int | None = None

    def place(self, path: str) -> str:
        """Return where the row stands in a source, for messages."""
        return f"{path}, row {self.number}" if self.line is None else f"{path}:{self.line}"


class ExactFloat(float):
    """A number of a JSON file that keeps its text, because 0.0000001 would become 1e-07, and 2.50 would become 2.5."""

    _text: str

    def __new__(cls, text: str) -> ExactFloat:
        number = super().__new__(cls, text)
        number._text = text
        return number

    def __str__(self) -> str:
        return self._text


def file_kind(path: Path) -> str | None:
    """Return "json", "csv", "parquet" or "arrow" by the name of a file, or None for another name."""
    names = [suffix.lower() for suffix in path.suffixes]
    if names and is_compressed(path):
        names.pop()
    return _KINDS.get(names[-1]) if names else None


def file_rows(path: Path, where: str) -> Iterator[Row]:
    """Yield the rows of a file in order. A file with an unknown ending is read as JSON lines.

    Args:
        path: The file.
        where: Name of the file for error messages.

    Raises:
        DataError: The file is missing, not readable, or of a kind that is not read.
    """
    check_file(path, where)
    kind, expansion = file_kind(path), Expansion(path, where)
    with open_file(path, where, expansion) as stream:
        if kind in ("parquet", "arrow"):
            from rlsys.tables import arrow  # with pyarrow, which a verifier's process does not need

            table = stream if stream.seekable() else io.BytesIO(stream.read())
            rows = arrow.parquet_rows if kind == "parquet" else arrow.arrow_rows
            yield from rows(table, where, Expansion(path, where))
            return
        if kind == "csv":
            texts = _csv_rows(stream, "\t" if ".tsv" in path.name.lower() else ",", where)
        else:
            texts = _json_rows(stream, where, is_named_json=kind is not None)
        for row in texts:
            if is_compressed(path):
                expansion.add(ROW_BYTES)
            yield row


def check_expansion(path: Path, where: str) -> None:
    """Raise DataError if a file that another library will read would expand to more than its bound."""
    if is_compressed(path):
        with open_file(path, where, Expansion(path, where)) as stream:
            while stream.read(MAX_CHUNK):
                pass
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # it reads no more of a member than this size
            Expansion(path, where).check(sum(member.file_size for member in archive.infolist()))
    elif file_kind(path) == "parquet":
        from rlsys.tables.arrow import open_parquet, refuse_declared

        refuse_declared(open_parquet(path, where), Expansion(path, where))


def check_file(path: Path, where: str) -> None:
    """Raise DataError if a file is missing, or only names its content in Git LFS."""
    if not path.is_file():
        raise DataError(f"{where}: no such file{origin(str(path), is_file=True)}")
    if is_lfs_pointer(path):
        raise DataError(f"{where}: expected data, found a Git LFS pointer; run git lfs pull")


@contextmanager
def open_file(path: Path, where: str, expansion: Expansion) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes. A compressed file is decompressed and cannot be sought in.

    Args:
        path: The file.
        where: Name of the file for error messages.
        expansion: Counter of the bytes of a compressed file.

    Raises:
        DataError: The file cannot be opened, expands to more than its bound, or a later read fails.
    """
    try:
        with open_compressed(path, expansion) if is_compressed(path) else path.open("rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{where}: cannot be read: {reason}") from None


def json_object(line: bytes) -> dict[str, Any] | str:
    """Return the object of a line of JSON, or the reason why it cannot be read."""
    value = _json_value(line)
    return value if isinstance(value, dict | str) else f"expected a JSON object, found {type_name(value)}"


def _json_value(text: bytes, lines: Sequence[int] = ()) -> Any:
    """Return the value of a JSON text, or the reason why it cannot be read.

    Args:
        text: the text.
        lines: numbers of its lines in the file, for a text of several lines.
    """
    try:
        value = json.loads(
            text.decode("utf-8-sig").rstrip(), object_pairs_hook=_without_repeats, parse_float=ExactFloat
        )
    except UnicodeDecodeError:
        return "not UTF-8"
    except DataError as error:
        return error.message
    except json.JSONDecodeError as error:
        line = f"line {lines[min(error.lineno, len(lines)) - 1]} " if lines else ""
        return f"not JSON: {error.msg} at {line}column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return "expected a JSON object, found str" if isinstance(value, str) else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise DataError(f"column {repeated}: expected it once in a row, found it twice")
    return values


def _json_rows(stream: IO[bytes], where: str, *, is_named_json: bool) -> Iterator[Row]:
    numbered = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    _refuse_encoding(first[1], where)
    values = json_object(first[1])
    if isinstance(values, str) and (text := first[1].removeprefix(b"\xef\xbb\xbf").lstrip()).startswith((b"[", b"{")):
        rest = list(numbered)
        numbers = [first[0], *(number for number, _ in rest)]
        whole = _json_value(b"".join([text, *(line for _, line in rest)]), numbers)
        if isinstance(whole, list):
            yield from _array_rows(whole)
            return
        if text.startswith(b"[") and values.startswith("not JSON"):  # an array over several lines
            raise DataError(f"{where}: expected one JSON array, found {whole}")
        if isinstance(whole, dict):
            keys = ", ".join(map(str, whole))
            raise DataError(f"{where}: expected an object on every line or a list of objects, found one object: {keys}")
        numbered = (line for line in rest)
    elif isinstance(values, str) and not is_named_json:
        raise DataError(f"{where}: expected a file {READ_KINDS}, or the folder or hub id of a data set")
    yield Row(number=first[0], values=values, line=first[0])
    for number, line in numbered:
        yield Row(number=number, values=json_object(line), line=number)


def _array_rows(entries: Sequence[Any]) -> Iterator[Row]:
    for number, entry in enumerate(entries, 1):
        reason = f"expected a JSON object, found {type_name(entry)}"
        yield Row(number=number, values=entry if isinstance(entry, dict) else reason)


def _csv_rows(stream: IO[bytes], delimiter: str, where: str) -> Iterator[Row]:
    # Every cell stays the text that it is. A byte that is not UTF-8 makes a text that `is_unicode` refuses.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    number = end = 0
    try:
        header = [name.strip() for name in next(reader, [])]
        _refuse_encoding(",".join(header).encode("utf-8", "surrogateescape"), where)
        if len(header) == 1 and any(other in header[0] for other in ",;\t|"):
            separator = "tabs" if delimiter == "\t" else "commas"
            raise DataError(f"{where}: expected columns separated by {separator}, found the header {header[0]!r}")
        refuse_repeats(header, where)
        end = reader.line_num  # of the row before
        for cells in reader:
            line, end = end + 1, reader.line_num
            if not cells:
                continue
            number += 1
            reason = f"expected {len(header)} cells, found {len(cells)}"
            values = dict(zip(header, cells, strict=False)) if len(cells) == len(header) else reason
            yield Row(number=number, values=values, line=line)
    except csv.Error as error:
        raise DataError(
            f"{where}: not readable from line {end + 1} on: {error}; a cell that begins with a quotation mark must end "
            "with one, and those inside are doubled"
        ) from None


def _refuse_encoding(start: bytes, where: str) -> None:
    """Raise DataError if the first bytes of a file say that it is UTF-16 or UTF-32."""
    encoding = json.detect_encoding(start)
    if not encoding.startswith("utf-8"):
        raise DataError(f"{where}: expected a file in UTF-8, found {encoding[:6].upper()}; save it as UTF-8")


def refuse_repeats(columns: Sequence[str], where: str) -> None:
    """Raise DataError if a file has two columns with the same name."""
    for name, times in Counter(columns).items():
        if times > 1:
            raise DataError(f"{where}, column {name}: expected it once, found it {times} times")


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded. A text from JSON can have half a surrogate pair."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text


def described(value: Any) -> str:
    """Return what a cell holds, for messages."""
    if isinstance(value, str) and not is_unicode(value):
        fault = "bytes that are not UTF-8" if _ESCAPED_BYTE.search(value) else "half a surrogate pair"
        return f"{fault} in {_SHOWN_BYTE.sub(_BYTE, repr(value[:40]))}"
    return "null" if value is None else f"{type_name(value)} {str(value)[:40]!r}"


def type_name(value: Any) -> str:
    """Return the name of a value's type, for messages."""
    return "float" if isinstance(value, float) else type(value).__name__


def first_line(error: Exception) -> str:
    """Return the first line of an error message, or the name of the error if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
