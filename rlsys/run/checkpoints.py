"""Store the checkpoints of a run: atomic commit, retention and lookup.

A checkpoint is a folder with a manifest (`rlsys.run.manifest`). One rename makes it visible, so a reader sees the
previous checkpoint or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlsys.errors import CheckpointError, DamagedFileError
from rlsys.fault_injection import fault
from rlsys.files import fsync
from rlsys.run.manifest import read_manifest, seal, verify_checkpoint

_TEMPORARY, _TRASH, _REPLACED, _ASIDE = ".tmp-", ".trash-", ".replaced-", ".aside-"
PINNED = ".pinned"
"""Suffix of an empty file next to a checkpoint, which is then never removed."""
_REQUIRED_SPACE = 1.3  # free space that a save needs, relative to the size of the last checkpoint

log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: has one subfolder for each checkpoint. It is created if missing.
        keep_last: number of newest checkpoints that a commit keeps, >= 1.
        keep_every: also keep checkpoints whose weight version is a multiple of it; 0 for none.
        best: a metric, and whether its largest or smallest score is the best. The checkpoint with the best score is
            kept too. Scores of another metric, recorded before the setting changed, are ignored. None keeps none.
    """

    def __init__(
        self, folder: Path, keep_last: int, keep_every: int = 0, best: tuple[str, Literal["max", "min"]] | None = None
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, found {keep_last}")
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.best = best

    def begin(self, name: str) -> Path:
        """Create the temporary folder that all writers, of any process, write a checkpoint into.

        Raises:
            CheckpointError: the folder cannot be created (disk full, no permission), or the disk has no room for
                another checkpoint of the size of the newest one.
        """
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"a checkpoint's name must be a plain folder name, found {name!r}")
        temporary = self.folder / f"{_TEMPORARY}{name}-{uuid.uuid4().hex}"
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                fsync(self.folder.parent)
            temporary.mkdir()
            self._check_room()
        except OSError as error:
            self.discard(temporary)
            raise _cannot_write(name, error) from error
        return temporary

    def commit(self, temporary: Path, name: str, info: Mapping[str, Any]) -> Path:
        """Turn a temporary folder into the checkpoint `name`, then remove old checkpoints.

        Order: fsync every file and folder, manifest, fsync, rename, fsync of the parent, prune. A checkpoint of the
        same name, left by an earlier attempt that could not be resumed from it, is replaced.

        Args:
            temporary: the folder that `begin` returned. It is gone afterwards, also after an error.
            info: JSON-able facts about the checkpoint; `weight_version` (int) orders the checkpoints.
        Raises:
            CheckpointError: the checkpoint could not be written. Earlier checkpoints are unchanged.
        """
        if not isinstance(info.get("weight_version"), int):
            raise ValueError("info needs an integer weight_version")
        version = info["weight_version"]
        try:
            fault("checkpoint.seal", version=version)
            seal(temporary, name, info)
            fault("checkpoint.rename", version=version)
            target = self._make_visible(temporary, name)
            fault("checkpoint.visible", version=version)
        except OSError as error:
            self.discard(temporary)
            raise _cannot_write(name, error) from error
        except CheckpointError:
            self.discard(temporary)
            raise
        try:
            self._prune(target, version)
            fault("checkpoint.prune", version=version)
        except OSError as error:
            log.warning("%s: old checkpoints could not be removed: %s", self.folder, error)
        return target

    def discard(self, temporary: Path) -> None:
        """Remove a temporary folder whose writers failed."""
        shutil.rmtree(temporary, ignore_errors=True)

    def latest(self) -> Path | None:
        """Return the newest valid checkpoint, or None if there are no checkpoints.

        Raises:
            DamagedFileError: checkpoints exist and all are invalid. Starting from scratch would hide the loss.
        """
        candidates = newest_first(self.folder)
        problem = ""
        for candidate in candidates:
            try:
                verify_checkpoint(candidate)
            except CheckpointError as error:
                problem = error.message
                log.warning("checkpoint skipped: %s", problem)
            else:
                return candidate
        if candidates:
            raise DamagedFileError(
                f"{self.folder}: none of the {len(candidates)} checkpoints is valid ({problem}); "
                f"restore one, or delete {self.folder} to start again from scratch"
            )
        return None

    def sweep(self) -> None:
        """Remove the leftovers of a killed attempt. The caller holds the run lock, and nothing is being saved."""
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if path.name.startswith((_TEMPORARY, _TRASH)):
                    shutil.rmtree(path, ignore_errors=True)

    def _check_room(self) -> None:
        last = next((size for path in newest_first(self.folder) if (size := _size(path))), 0)
        free = shutil.disk_usage(self.folder).free
        if free < _REQUIRED_SPACE * last:
            raise OSError(
                errno.ENOSPC, f"{free / 2**20:,.0f} MiB are free, and the last checkpoint has {last / 2**20:,.0f} MiB"
            )

    def _make_visible(self, temporary: Path, name: str) -> Path:
        target = self.folder / name
        if target.exists():
            # `latest` still sees the replaced one, so a crash between the two renames loses no checkpoint.
            os.rename(target, self.folder / f"{name}{_REPLACED}{uuid.uuid4().hex}")
        os.rename(temporary, target)
        fsync(self.folder)
        return target

    def _prune(self, newest: Path, weight_version: int) -> None:
        """Remove all but the newest `keep_last`, the best, those of `keep_every` and the pinned checkpoints.

        A checkpoint of the same, a later or a damaged weight version is removed too. It belongs to a history that was
        abandoned: it was invalid, or the run was resumed on purpose from an earlier checkpoint. A checkpoint that
        cannot be read now is set aside, because it could later become readable and pass for the newest.
        """
        weight_versions = {path: _weight_version(path) for path in newest_first(self.folder) if path != newest}
        known = {path: version for path, version in weight_versions.items() if version is not None}
        earlier = [path for path, version in known.items() if version < weight_version]
        best = self._best([newest, *earlier])
        to_keep = {*earlier[: self.keep_last - 1], *(best[:1] if best else ())}
        if self.keep_every:
            to_keep |= {path for path in earlier if known[path] % self.keep_every == 0}
        for path, version in weight_versions.items():
            if version is None:  # pinned or not: setting it aside loses nothing
                log.warning("%s cannot be read and is put aside as %s%s", path, _ASIDE, path.name)
                os.rename(path, self.folder / f"{_ASIDE}{path.name}")
            elif path not in to_keep and not path.with_name(path.name + PINNED).exists():
                self._remove(path)

    def earlier_best(self) -> tuple[Path, float] | None:
        """Return the checkpoint with the best score, and the score.

        None means that the newest checkpoint is the best, or that no checkpoint has a score.
        """
        paths = newest_first(self.folder)
        best = self._best(paths)
        return None if best is None or best[0] == paths[0] else best

    def _best(self, paths: Sequence[Path]) -> tuple[Path, float] | None:
        """Return the path with the best score, and the score; of equal scores the first."""
        if self.best is None:
            return None
        metric, mode = self.best
        scores = {path: score for path in paths if (score := _score(path, metric)) is not None}
        choose = min if mode == "min" else max
        return choose(scores.items(), key=lambda item: item[1], default=None)

    def _remove(self, path: Path) -> None:
        trash = self.folder / f"{_TRASH}{path.name}-{uuid.uuid4().hex}"
        os.rename(path, trash)  # first, so that `latest` never sees a half-deleted checkpoint
        shutil.rmtree(trash)


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder by their weight versions, also damaged ones. A missing folder has none."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(paths, key=_age_key, reverse=True)


def _age_key(path: Path) -> tuple[float, bool, str]:
    version = _weight_version(path)
    return math.inf if version is None else version, _REPLACED not in path.name, path.name


def _weight_version(path: Path) -> float | None:
    """Return the weight version for ordering: infinity for a damaged or missing manifest, so that `latest` reports it.

    None means that the manifest exists and cannot be read, which may be temporary.
    """
    try:
        return int(read_manifest(path)["info"]["weight_version"])
    except CheckpointError as error:
        cause = error.__cause__
        return None if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) else math.inf
    except (KeyError, TypeError, ValueError):
        return math.inf


def _score(path: Path, metric: str) -> float | None:
    """Return the recorded score of a checkpoint, or None if it has none for this metric."""
    with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):
        score = read_manifest(path)["info"]["score"]
        value = float(score["value"])
        return value if score["metric"] == metric and math.isfinite(value) else None
    return None


def _size(path: Path) -> int:
    """Return the bytes of a checkpoint, or 0 if its manifest cannot be read."""
    with contextlib.suppress(CheckpointError, TypeError, ValueError):
        return sum(int(entry["size"]) for entry in read_manifest(path)["files"])
    return 0


def _cannot_write(name: str, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free disk space" if full else "check the folder of run.dir"
    return CheckpointError(
        f"checkpoint {name} could not be written: {error}; {advice}. Earlier checkpoints are untouched"
    )
