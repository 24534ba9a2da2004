"""Compressed files as streams, and the bound on what a file may expand to."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rlsys.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_RATIO = 100
"""How many times its size a file may expand to."""
ALWAYS_ALLOWED_MIB = 64
"""Every file may expand to this size, in MiB, because small files of repeated rows have large ratios."""
ROW_BYTES = 64
"""Least size of a row in memory, which counts besides its content: a file can consist of millions of tiny rows."""
_BUFFER = 2**17


def _open_zst(path: Path) -> Any:
    import pyarrow as pa  # Python 3.14 is the first with zstd of its own

    return pa.input_stream(str(path), compression="zstd")


COMPRESSED: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
"""Functions that open a compressed file, by its ending."""


class Expansion:
    """Size that a file has expanded to, which must stay below a bound.

    Args:
        path: The file.
        where: Name of the file for error messages.
    """

    def __init__(self, path: Path, where: str) -> None:
        self._where, self._file_size, self._size = where, path.stat().st_size, 0
        self._limit = max(MAX_RATIO * self._file_size, ALWAYS_ALLOWED_MIB * 2**20)

    def add(self, size: int) -> None:
        """Count bytes that the file has expanded to.

        Raises:
            DataError: The file has expanded to more than its bound.
        """
        self._size += size
        self.check(self._size)

    def check(self, size: int) -> None:
        """Raise DataError if a size is beyond the bound."""
        if size > self._limit:
            raise DataError(
                f"{self._where}: expected at most {self._limit / 2**20:,.0f} MiB from a file of {self._file_size:,} "
                f"bytes ({MAX_RATIO} times its size, or {ALWAYS_ALLOWED_MIB} MiB), found more; if you trust the file, "
                "write it as .jsonl without compression"
            )


class _Counted(io.RawIOBase):
    """Stream whose bytes count as expansion."""

    def __init__(self, stream: Any, expansion: Expansion) -> None:
        self._stream, self._expansion = stream, expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        self._expansion.add(len(data))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def is_compressed(path: Path) -> bool:
    """Return whether the ending of a file says that it is compressed."""
    return path.suffix.lower() in COMPRESSED


def open_compressed(path: Path, expansion: Expansion) -> IO[bytes]:
    """Open a compressed file for reading its content from the beginning to the end.

    Args:
        path: The file.
        expansion: Counter of the bytes that are read.

    Raises:
        DataError: At a later read, if the content is larger than its bound.
    """
    stream = COMPRESSED[path.suffix.lower()](path)
    return io.BufferedReader(_Counted(stream, expansion), _BUFFER)
