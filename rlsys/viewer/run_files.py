"""The files of a run as the pages read them: again and again, also while the run writes them."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlsys.config.files import load_config
from rlsys.config.schema import Config
from rlsys.directory import RunDirectory, SearchDirectory
from rlsys.earlier_runs import check_run_folder
from rlsys.errors import ConfigError, DamagedFileError, RlsysError
from rlsys.run.lock import may_be_in_use
from rlsys.run.rollout_files import cut_off_faults, rollout_files, rows_by_version
from rlsys.search.tree_index import TreeIndex

Row = dict[str, Any]


class RunFiles:
    """The files of a run directory of `rlsys train` or `rlsys search`.

    Args:
        path: the run directory.
    Raises:
        ConfigError: the folder is none, or does not exist.
    """

    def __init__(self, path: Path) -> None:
        check_run_folder(path)
        self.path, self.directory = path, RunDirectory(path)
        self.trees = TreeIndex(path)
        if not self.is_run():
            raise ConfigError(
                f"{path}: expected a run directory of `rlsys train` or `rlsys search`, found no metrics.jsonl, "
                "config.yaml or trees in it"
            )
        self._lock = threading.Lock()  # pages are made in several threads
        self._rows: list[Row] = []
        self._position, self._inode = 0, 0
        self.damaged = 0
        self._members = lru_cache(maxsize=8)(_members)

    def is_run(self) -> bool:
        """Return whether the folder holds any of the files of a run."""
        searches = (SearchDirectory(self.path), self.directory.search_stage)
        directory = self.directory
        files = (directory.metrics, directory.config, directory.rollouts, *(search.trees for search in searches))
        return any(path.exists() for path in files)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.resolve().name

    @property
    def is_live(self) -> bool:
        """Whether a process uses the directory, as far as its lock tells."""
        return may_be_in_use(self.path)

    def rows(self) -> Sequence[Row]:
        """Return the rows of metrics.jsonl. Only new lines are read; lines that are no rows are counted as damaged."""
        with self._lock:
            self._read_new_rows(self.directory.metrics)
            return list(self._rows)

    def _read_new_rows(self, path: Path) -> None:
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        if status.st_ino != self._inode or status.st_size < self._position:  # a resumed run replaces the file
            self._rows, self._position, self._inode, self.damaged = [], 0, status.st_ino, 0
        with path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data.rfind(b"\n") + 1  # the run may be in the middle of a line
        self._position += whole
        for line in data[:whole].splitlines():
            try:
                row = json.loads(line)
                self._rows.append({"stage": str(row["stage"]), "step": int(row["step"]), **_numbers(row)})
            except (ValueError, KeyError, TypeError):
                self.damaged += 1

    def rollouts(self, version: int | None = None) -> tuple[int, list[Row]]:
        """Return a weight version with kept rollouts, and its rows: the version asked for, or else the nearest one.

        Raises:
            DamagedFileError: the file cannot be read, or is of a newer format.
        """
        files = rollout_files(self.directory.rollouts)
        if version is not None:
            files = sorted(files, key=lambda file: (file[0] > version, abs(version - file[0])))
        else:
            files = files[::-1]
        for _, path in files:
            if by_version := self._by_version(path):
                wanted = max(by_version) if version is None else version
                nearest = min(by_version, key=lambda kept: (abs(kept - wanted), kept))
                return nearest, by_version[nearest]
        return 0, []

    def cut_off_rollouts(self) -> list[str]:
        """Return the faults of files of rollouts that are cut off inside their first step."""
        return cut_off_faults(self.path)

    def neighbours(self, version: int) -> tuple[int | None, int | None]:
        """Return the kept weight versions before and after one."""
        files = rollout_files(self.directory.rollouts)
        place = max((n for n, (first, _) in enumerate(files) if first <= version), default=0)
        kept = sorted({each for _, path in files[max(0, place - 1) : place + 2] for each in self._by_version(path)})
        return max((k for k in kept if k < version), default=None), min((k for k in kept if k > version), default=None)

    def versions_like(self, version: int) -> dict[int, list[Row]]:
        """Return the rollouts of all weight versions that are in the file of one of them."""
        files = [path for first, path in rollout_files(self.directory.rollouts) if first <= version]
        return self._by_version(files[-1]) if files else {}

    def _by_version(self, path: Path) -> dict[int, list[Row]]:
        try:
            status = path.stat()
        except FileNotFoundError:
            return {}
        return self._members(path, status.st_mtime_ns, status.st_size)

    def config(self) -> Config | None:
        """Return the config of the run; None if it has none, or that of another version of rlsys."""
        try:
            return load_config(self.directory.config)
        except RlsysError:
            return None

    def config_text(self) -> str:
        """Return the text of config.yaml; "" if there is none."""
        try:
            return self.directory.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""


def _members(path: Path, _mtime: int, _size: int) -> dict[int, list[Row]]:
    try:
        return rows_by_version(path)
    except RlsysError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path}: expected rows of rollouts, found others ({error})") from error


def _numbers(row: Row) -> Row:
    return {
        name: value if abs(value) < 2**63 else math.inf
        for name, value in row.items()
        if name not in ("stage", "step") and isinstance(value, int | float) and not isinstance(value, bool)
    }
