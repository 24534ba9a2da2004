"""The trees of one run directory: shards of lines, and the finished trees of shards that are still open.

    trees/00000.jsonl     `search.shard_size` trees in the order of the prompts; the last one may be shorter
    trees/.open/130.json  a finished tree whose shard is not complete
    search.json           what decided the trees

Every file appears whole, by one rename, so a kill at any moment loses no finished tree. A shard that is shorter than
`search.prompts` asks for stays as it is until its further trees are there too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.directory import SearchDirectory
from rlsys.errors import CheckpointError, ConfigError, DataError
from rlsys.files import read_json, write_json, write_text
from rlsys.search.tree_json import FORMAT, read_trees, tree_line
from rlsys.trees import Tree, TreeFailure

_SHARD = re.compile(r"(\d{5,})\.jsonl")
_OPEN_TREE = re.compile(r"(0|[1-9]\d*)\.json")
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")  # of rlsys.run.checkpoints.write_text

Visit = Callable[[int, Tree | TreeFailure], object]


class TreeStore:
    """The trees of a run directory, by the number of their prompt. One process at a time: see `RunLock`.

    Args:
        names: ids of all prompts asked for, in order.
        visit: called with number and tree of every finished one.
    Raises:
        DataError: a file in the folder is damaged or none of this store; it is left as it is.
        ConfigError: there are trees of more prompts than asked for.
    """

    def __init__(self, run_dir: Path, shard_size: int, names: Sequence[str], visit: Visit) -> None:
        directory = SearchDirectory(run_dir)
        self.folder, self._open_folder = directory.trees, directory.open_trees
        self._size, self._names = shard_size, names
        self._lines: dict[int, int] = {}  # of each shard's file
        self._open: set[int] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (run_dir, self.folder, self._open_folder):
            _sweep(folder)
        self._load_shards(visit)
        self._load_open(visit)
        for shard in sorted({number // shard_size for number in self._open}):
            self._close_if_complete(shard)

    def missing(self) -> list[int]:
        """Numbers of the prompts whose trees are still to be grown."""
        return [number for number in range(len(self._names)) if not self._has(number)]

    def add(self, number: int, tree: Tree | TreeFailure) -> None:
        """Keep a finished tree, and write its shard where that is now complete.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._has(number) or tree.prompt_id != self._names[number]:
            raise ValueError(f"expected a missing tree of {self._names[number]}, found one of {tree.prompt_id}")
        self._open_folder.mkdir(exist_ok=True)
        write_text(self._open_file(number), tree_line(tree) + "\n")
        self._open.add(number)
        self._close_if_complete(number // self._size)

    def _has(self, number: int) -> bool:
        return number in self._open or number % self._size < self._lines.get(number // self._size, 0)

    def _load_shards(self, visit: Visit) -> None:
        for path in sorted(self.folder.iterdir()):
            if path == self._open_folder and path.is_dir():
                continue
            match = _SHARD.fullmatch(path.name)
            if match is None or path != self._shard_file(int(match[1])) or not path.is_file():
                raise _foreign(path)
            first = int(match[1]) * self._size
            self._lines[int(match[1])] = self._load(path, first, self._size, visit)

    def _load_open(self, visit: Visit) -> None:
        for path in sorted(self._open_folder.iterdir()) if self._open_folder.is_dir() else ():
            match = _OPEN_TREE.fullmatch(path.name)
            if match is None or not path.is_file():
                raise _foreign(path)
            if self._has(int(match[1])):
                path.unlink()  # a kill came between the shard and this
                continue
            self._load(path, int(match[1]), 1, visit)
            self._open.add(int(match[1]))

    def _load(self, path: Path, first: int, most: int, visit: Visit) -> int:
        """Read a file of trees from number `first` on; how many there are."""
        number = first
        for number, tree in enumerate(read_trees(path), start=first + 1):
            if number > first + most:
                raise DataError(f"{path}: expected at most {most} trees, found more; {_ADVICE}")
            if number > len(self._names):
                raise ConfigError(
                    f"search.prompts is {len(self._names)}, but {path} holds the tree of prompt number {number}: "
                    "raise it, or choose a new run.dir"
                )
            if tree.prompt_id != self._names[number - 1]:
                raise DataError(
                    f"{path}, line {number - first}: expected the tree of prompt {self._names[number - 1]}, "
                    f"found {tree.prompt_id}; {_ADVICE}"
                )
            visit(number - 1, tree)
        if number == first:
            raise DataError(f"{path}: expected trees, found an empty file; {_ADVICE}")
        return number - first

    def _close_if_complete(self, shard: int) -> None:
        first = shard * self._size
        numbers = range(first, min(first + self._size, len(self._names)))
        waiting = [number for number in numbers if number in self._open]
        if not all(self._has(number) for number in numbers):
            return
        before = self._shard_file(shard).read_text(encoding="utf-8") if shard in self._lines else ""
        texts = [self._open_file(number).read_text(encoding="utf-8") for number in waiting]
        write_text(self._shard_file(shard), before + "".join(texts))
        self._lines[shard] = len(numbers)
        self._open.difference_update(waiting)
        for number in waiting:
            self._open_file(number).unlink()
        with contextlib.suppress(OSError):  # not empty: another shard is open
            self._open_folder.rmdir()

    def _shard_file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.jsonl"

    def _open_file(self, number: int) -> Path:
        return self._open_folder / f"{number}.json"


_ADVICE = "restore the file, or move it away to have its trees grown again"


def check_origin(run_dir: Path, fixed: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Compare with what the trees of a run directory were made of, or note it where there is none yet.

    A search that ended before its first tree binds nobody: its engines may have refused the config.

    Args:
        fixed: values that decide the trees, by the dotted name of their config field.
        inputs: digests of what the config only names, by the field that names it.
    Raises:
        ConfigError: one differs; names the field.
        DataError: search.json is damaged, or trees are there without it.
    """
    directory = SearchDirectory(run_dir)
    path = directory.origin
    now: dict[str, Any] = {"format": FORMAT, "fixed": dict(fixed), "inputs": dict(inputs)}
    holds_trees = _holds_files(directory.trees) or _holds_files(directory.open_trees)
    if holds_trees and not path.exists():
        raise DataError(f"{path}: missing, though {directory.trees} holds trees; restore it, or choose a new run.dir")
    before = _read_origin(path) if path.exists() else now
    if not holds_trees:
        write_json(path, now)
        return
    different = _different(before["fixed"], fixed)
    if different:
        name = different[0]
        raise ConfigError(
            f"{name} differs from the search to be continued ({path}): expected {before['fixed'].get(name)!r}, "
            f"found {fixed.get(name)!r}; set it back, or choose a new run.dir"
            + (f" (also different: {', '.join(different[1:])})" if different[1:] else "")
        )
    if changed := _different(before["inputs"], inputs):
        raise ConfigError(
            f"{' and '.join(changed)}: the contents differ from those that the trees of {run_dir} were made with; "
            "put them back, or choose a new run.dir"
        )


def _holds_files(folder: Path) -> bool:
    """Whether any is there, those left aside that a killed process was still writing."""
    found = folder.iterdir() if folder.is_dir() else ()
    return any(path.is_file() and not _UNFINISHED.fullmatch(path.name) for path in found)


def _read_origin(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise DataError(error.message) from None
    whole = isinstance(found, dict) and set(found) == {"format", "fixed", "inputs"} and found["format"] == FORMAT
    if not whole or not isinstance(found["fixed"], dict) or not isinstance(found["inputs"], dict):
        raise DataError(f"{path}: expected format {FORMAT} with the keys fixed and inputs; choose a new run.dir")
    return found


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]


def _sweep(folder: Path) -> None:
    """Remove files that a killed process was still writing."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink()


def _foreign(path: Path) -> DataError:
    return DataError(f"{path}: expected only tree files here; move it away")
