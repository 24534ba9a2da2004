"""Places of the trees of a run in their files, so that one of many trees is read without the others."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rlsys.directory import RunDirectory, SearchDirectory
from rlsys.errors import DataError
from rlsys.search.tree_json import parse_line
from rlsys.trees import Tree, TreeFailure

_PROMPT = re.compile(rb'"prompt_id":("(?:[^"\\]|\\.)*")')
_BEGINNING = 4096  # bytes of a line that hold its prompt id
_BUFFER = 1 << 18  # bytes; lines of trees are much longer than the buffer that files have without it
# A quote inside a text is escaped, so no text holds these bytes.
_NODES = b'"nodes":['
_OK = re.compile(
    rb'"outcome":"ok","reward":([-+.0-9eE]+),"answered":(?:true|false),"detail":"(?:[^"\\]|\\.)*"'
    rb'(,"parts":\{(?:"(?:[^"\\]|\\.)*"|[^}"])*\})?\},"scored":\d'
)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a tree.

    Attributes:
        search: number of the search directory.
        start: byte offset of its line, and `length` its bytes.
        right: whether an answer of it was judged as right.
        failed: whether the line is a failure instead of a tree.
    """

    path: Path
    search: int
    start: int
    length: int
    prompt_id: str
    right: bool
    failed: bool


_Content = tuple[Sequence[Place], bool]
"""The places of the whole lines of a file, and whether it ends with one."""


def searches_of(run_dir: Path) -> tuple[SearchDirectory, SearchDirectory]:
    """Return the directories of a run that may hold trees: those of `rlsys search` and of the stage `search`."""
    return SearchDirectory(run_dir), RunDirectory(run_dir).search_stage


def shards(trees: Path) -> list[Path]:
    """Return the files in a folder of trees, in the order of their prompts."""
    return sorted(trees.glob("[0-9]*.jsonl"), key=_by_number)


def tree_files(search: SearchDirectory) -> list[Path]:
    """Return the shards of a search, and the files of single trees whose shard is not complete."""
    return shards(search.trees) + sorted(search.open_trees.glob("[0-9]*.json"), key=_by_number)


def _by_number(path: Path) -> tuple[int, str]:
    return len(path.name), path.name


class TreeIndex:
    """The trees of a search, or of the stage `search` of a training run, by number.

    Files that appear or change are read at the next `refresh`.

    Args:
        run_dir: a run directory.

    Attributes:
        places: the places of the trees.
        cut_off: files that are empty or end within a line. A search puts whole files in place (see `TreeStore`), so
            they are damaged.
    """

    def __init__(self, run_dir: Path) -> None:
        self.searches = searches_of(run_dir)
        self.places: list[Place] = []
        self.cut_off: list[Path] = []
        self._files: dict[Path, tuple[tuple[int, int], _Content]] = {}
        self._tree = lru_cache(maxsize=64)(_read_tree)

    def refresh(self) -> None:
        """Look for new trees.

        Raises:
            DataError: a file cannot be read.
        """
        places: list[Place] = []
        cut_off: list[Path] = []
        for number, search in enumerate(self.searches):
            for path in tree_files(search):
                content, is_whole = self._file_places(path, number)
                places += content
                cut_off += [] if is_whole else [path]
        self.places, self.cut_off = places, cut_off

    def has_files(self) -> bool:
        """Return whether there is a file of trees, without reading it."""
        return any(next(search.trees.glob("**/[0-9]*.json*"), None) for search in self.searches)

    def _file_places(self, path: Path, search: int) -> _Content:
        try:
            status = path.stat()
            version = (status.st_mtime_ns, status.st_size)
            if path not in self._files or self._files[path][0] != version:
                self._files[path] = (version, _scan(path, search))
        except FileNotFoundError:  # an open tree that has just moved into its shard
            return (), True
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        return self._files[path][1]

    def tree(self, number: int) -> Tree | TreeFailure:
        """Return a tree.

        Raises:
            DataError: its line is damaged, or of another format.
        """
        return self._tree(self.places[number])

    def search_of(self, number: int) -> SearchDirectory:
        """Return the directory of the search that grew a tree."""
        return self.searches[self.places[number].search]


def _scan(path: Path, search: int) -> _Content:
    places, start, is_whole = [], 0, False
    with path.open("rb", buffering=_BUFFER) as file:
        for line in file:
            is_whole = line.endswith(b"\n")
            if is_whole:
                places.append(_place(path, search, start, line))
            start += len(line)
    return places, is_whole


def _place(path: Path, search: int, start: int, line: bytes) -> Place:
    match = _PROMPT.search(line, 0, _BEGINNING)
    return Place(
        path=path,
        search=search,
        start=start,
        length=len(line),
        prompt_id=json.loads(match[1].decode("utf-8", "replace")) if match else "?",
        right=any(float(match[1]) > 0 or match[2] for match in _OK.finditer(line)),  # as `ThoughtNode.correct`
        failed=_NODES not in line,
    )


def _read_tree(place: Place) -> Tree | TreeFailure:
    where = f"{place.path}, byte {place.start}"
    try:
        with place.path.open("rb") as file:
            file.seek(place.start)
            text = file.read(place.length).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error
    return parse_line(text, where)
