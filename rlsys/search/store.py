"""Trees of a run directory: complete shards, and the finished trees of shards that are still open.

    trees/00000.jsonl     `search.shard_size` trees in the order of the prompts; the last shard may be shorter
    trees/.open/130.json  a finished tree whose shard is not complete
    search.json           the config values and digests that determine the trees

A rename puts every file in place as a whole, so a kill at any moment loses no finished tree. If `search.prompts` was
raised, a short shard is rewritten once all its further trees are finished.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.config.compare import check_equal, differing_names
from rlsys.directory import SearchDirectory
from rlsys.errors import CheckpointError, ConfigError, DataError
from rlsys.files import read_json, write_json, write_text
from rlsys.search.tree_json import FORMAT, read_trees, tree_line
from rlsys.trees import Tree, TreeFailure

_SHARD = re.compile(r"(\d{5,})\.jsonl")
_OPEN_TREE = re.compile(r"(0|[1-9]\d*)\.json")
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")  # a temporary file of rlsys.files

Visit = Callable[[int, Tree | TreeFailure], object]


class TreeStore:
    """Store of the trees of a run directory by prompt number, for one process at a time (see `RunLock`).

    Args:
        run_dir: The run directory.
        shard_size: Number of trees in a shard.
        names: Ids of all prompts of the search, in order.
        visit: Function that is called with the number and the tree of every finished prompt.

    Raises:
        DataError: A file in the folder is damaged or does not belong to the store. The file stays as it is.
        ConfigError: The folder has trees of more prompts than `names`.
    """

    def __init__(self, run_dir: Path, shard_size: int, names: Sequence[str], visit: Visit) -> None:
        directory = SearchDirectory(run_dir)
        self.folder, self._open_folder = directory.trees, directory.open_trees
        self._size, self._names = shard_size, names
        self._lines: dict[int, int] = {}  # number of trees in each shard's file
        self._open: set[int] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (run_dir, self.folder, self._open_folder):
            _sweep(folder)
        self._load_shards(visit)
        self._load_open(visit)
        for shard in sorted({number // shard_size for number in self._open}):
            self._close_if_complete(shard)

    def missing(self) -> list[int]:
        """Return the numbers of the prompts without a tree."""
        return [number for number in range(len(self._names)) if not self._has(number)]

    def add(self, number: int, tree: Tree | TreeFailure) -> None:
        """Store a finished tree, and write its shard if it is now complete.

        Raises:
            CheckpointError: The tree cannot be written.
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
                path.unlink()  # the process was killed after it had written the shard
                continue
            self._load(path, int(match[1]), 1, visit)
            self._open.add(int(match[1]))

    def _load(self, path: Path, first: int, most: int, visit: Visit) -> int:
        """Read a file whose first tree has number `first`. Return the number of its trees."""
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
        with contextlib.suppress(OSError):  # the folder is not empty if another shard is open
            self._open_folder.rmdir()

    def _shard_file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.jsonl"

    def _open_file(self, number: int) -> Path:
        return self._open_folder / f"{number}.json"


_ADVICE = "restore the file, or move it away to have its trees grown again"


def check_origin(run_dir: Path, fixed: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Raise if the trees of a run directory have another origin. Record the origin if there are no trees yet.

    A recorded origin without trees is replaced, because the engines may have refused its config.

    Args:
        run_dir: The run directory.
        fixed: Config values that determine the trees, by dotted field name.
        inputs: Digests of files that the config names, by the name of the field.

    Raises:
        ConfigError: A value or digest differs. The message names the field.
        DataError: search.json is damaged, or the directory has trees without it.
    """
    directory = SearchDirectory(run_dir)
    path = directory.origin
    origin: dict[str, Any] = {"format": FORMAT, "fixed": dict(fixed), "inputs": dict(inputs)}
    holds_trees = _holds_files(directory.trees) or _holds_files(directory.open_trees)
    if holds_trees and not path.exists():
        raise DataError(f"{path}: missing, though {directory.trees} holds trees; restore it, or choose a new run.dir")
    before = _read_origin(path) if path.exists() else origin
    if not holds_trees:
        write_json(path, origin)
        return
    check_equal(before["fixed"], fixed, f"the search to be continued ({path})")
    if changed := differing_names(before["inputs"], inputs):
        raise ConfigError(
            f"{' and '.join(changed)}: the contents differ from those that the trees of {run_dir} were made with; "
            "put them back, or choose a new run.dir"
        )


def _holds_files(folder: Path) -> bool:
    """Return whether a folder has files, apart from unfinished files of a killed process."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return any(path.is_file() and not _UNFINISHED.fullmatch(path.name) for path in paths)


def _read_origin(path: Path) -> dict[str, Any]:
    try:
        origin = read_json(path)
    except CheckpointError as error:
        raise DataError(error.message) from None
    whole = isinstance(origin, dict) and set(origin) == {"format", "fixed", "inputs"} and origin["format"] == FORMAT
    if not whole or not isinstance(origin["fixed"], dict) or not isinstance(origin["inputs"], dict):
        raise DataError(f"{path}: expected format {FORMAT} with the keys fixed and inputs; choose a new run.dir")
    return origin


def _sweep(folder: Path) -> None:
    """Remove the unfinished files of a killed process."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink()


def _foreign(path: Path) -> DataError:
    return DataError(f"{path}: expected only tree files here; move it away")
