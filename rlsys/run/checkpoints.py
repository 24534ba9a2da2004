"""Checkpoints: manifest, atomic commit, retention and lookup; the run lock; the run state as JSON.

A checkpoint is a folder whose MANIFEST.json, written last, names every file with its size and sha256.
A folder becomes visible by one rename, so a reader sees the previous checkpoint or the new one, never a part.
The digests guard against accidents, not against a writer with intent: a run directory is trusted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError, ConfigError
from rlsys.fault_injection import fault
from rlsys.files import fsync
from rlsys.types import RunState

MANIFEST = "MANIFEST.json"
SCHEMA = 1
_TEMPORARY, _TRASH, _REPLACED, _ASIDE = ".tmp-", ".trash-", ".replaced-", ".aside-"
PINNED = ".pinned"  # an empty file of this suffix beside a checkpoint keeps it
_ROOM = 1.3  # free space that a save asks for, in sizes of the last one

log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: holds one sub-folder a checkpoint; created where missing.
        keep_last: newest checkpoints that stay after a commit, >= 1.
        keep_every: those of weight versions that are multiples of it stay too; 0 for none.
        best: a metric, and whether its largest or its smallest `score` in an info is the best, which stays too; None
            for neither. Scores of other metrics, of before it was changed, do not count.
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
        """Make the temporary folder that all writers, of any process, write a checkpoint into.

        Raises:
            CheckpointError: the folder cannot be made (disk full, no permission), or there is no room for a checkpoint
                of the size of the newest one.
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

    def _check_room(self) -> None:
        last = next((size for path in self._newest_first() if (size := _size(path))), 0)
        free = shutil.disk_usage(self.folder).free
        if free < _ROOM * last:
            raise OSError(
                errno.ENOSPC, f"{free / 2**20:,.0f} MiB are free, and the last one has {last / 2**20:,.0f} MiB"
            )

    def commit(self, temporary: Path, name: str, info: Mapping[str, Any]) -> Path:
        """Make what was written into `temporary` the checkpoint `name`, then remove old checkpoints.

        Order: fsync every file and folder, manifest, fsync, rename, fsync of the parent, prune. A checkpoint
        of the same name (of an earlier attempt that could not be resumed from it) is replaced.

        Args:
            temporary: the folder `begin` returned; gone afterwards, also after an error.
            info: JSON-able facts of the checkpoint; `weight_version` (int) orders checkpoints.
        Raises:
            CheckpointError: it could not be written; earlier checkpoints are as they were.
        """
        if not isinstance(info.get("weight_version"), int):
            raise ValueError("info needs an integer weight_version")
        version = info["weight_version"]
        try:
            fault("checkpoint.seal", version=version)
            _seal(temporary, name, info)
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
        """The newest valid checkpoint, or None where there is no checkpoint at all.

        Raises:
            CheckpointError: checkpoints exist and none is valid; starting from scratch would hide the loss.
        """
        candidates = self._newest_first()
        problem = ""
        for candidate in candidates:
            try:
                self.verify(candidate)
            except CheckpointError as error:
                problem = error.message
                log.warning("checkpoint skipped: %s", problem)
            else:
                return candidate
        if candidates:
            raise CheckpointError(
                f"{self.folder}: none of the {len(candidates)} checkpoints is valid ({problem}); "
                f"restore one, or delete {self.folder} to start again from scratch"
            )
        return None

    @staticmethod
    def verify(path: Path) -> dict[str, Any]:
        """Check every file of a checkpoint against its manifest and return the manifest's `info`.

        Raises:
            CheckpointError: names the first file that is missing, additional or different.
        """
        manifest = _read_manifest(path)
        expected = {entry["path"]: entry for entry in manifest["files"]}
        try:
            found = _plain_files(path)
            found.pop(MANIFEST)
            for name in sorted(expected.keys() | found.keys()):
                _verify_file(path, name, expected.get(name), found.get(name))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return dict(manifest["info"])

    def sweep(self) -> None:
        """Remove what a killed attempt left behind. Call it under the run lock, while nothing is being saved."""
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if path.name.startswith((_TEMPORARY, _TRASH)):
                    shutil.rmtree(path, ignore_errors=True)

    def _make_visible(self, temporary: Path, name: str) -> Path:
        target = self.folder / name
        if target.exists():
            # Renamed within sight of `latest`: a crash between the two renames must not leave nothing.
            os.rename(target, self.folder / f"{name}{_REPLACED}{uuid.uuid4().hex}")
        os.rename(temporary, target)
        fsync(self.folder)
        return target

    def _prune(self, newest: Path, weight_version: int) -> None:
        """Keep `newest` and the `keep_last - 1` before it, the best one, those of `keep_every`, and every pinned one.

        Others of the same, a later or a damaged weight version belong to a course that this one replaces: they exist
        only where they were invalid, or where the run was resumed from an earlier one on purpose. One that cannot be
        read now is put aside: could it be read again, it might be the newest, of a course that was left.
        """
        found = {path: _weight_version(path) for path in self._newest_first() if path != newest}
        versions = {path: version for path, version in found.items() if version is not None}
        earlier = [path for path, version in versions.items() if version < weight_version]
        kept = {*earlier[: self.keep_last - 1], self._best([newest, *earlier])}
        if self.keep_every:
            kept |= {path for path in earlier if versions[path] % self.keep_every == 0}
        for path, version in found.items():
            if version is None:  # pinned or not: nothing of it is lost
                log.warning("%s cannot be read and is put aside as %s%s", path, _ASIDE, path.name)
                os.rename(path, self.folder / f"{_ASIDE}{path.name}")
            elif path not in kept and not path.with_name(path.name + PINNED).exists():
                self._remove(path)

    def _best(self, paths: Sequence[Path]) -> Path | None:
        """Of those with a score, the newest where several are equal."""
        if self.best is None:
            return None
        metric, mode = self.best
        sign = -1 if mode == "min" else 1
        scores = {path: sign * score for path in paths if (score := _score(path, metric)) is not None}
        return max(scores, key=lambda path: scores[path], default=None)

    def _remove(self, path: Path) -> None:
        trash = self.folder / f"{_TRASH}{path.name}-{uuid.uuid4().hex}"
        os.rename(path, trash)  # first out of sight, so that a half-deleted one is never looked at
        shutil.rmtree(trash)

    def _newest_first(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        paths = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return sorted(paths, key=_age_key, reverse=True)


def _age_key(path: Path) -> tuple[float, bool, str]:
    version = _weight_version(path)
    return math.inf if version is None else version, _REPLACED not in path.name, path.name


def _seal(folder: Path, name: str, info: Mapping[str, Any]) -> None:
    """Bring everything below a folder to disk, the manifest last."""
    files = _plain_files(folder)
    if MANIFEST in files:
        raise CheckpointError(f"{folder}: a writer made {MANIFEST}; that name is the checkpoint's own")
    entries = [
        {"path": path, "size": file.stat().st_size, "sha256": _sha256(file)} for path, file in sorted(files.items())
    ]
    for file in files.values():
        fsync(file)
    for root, _, _ in os.walk(folder, topdown=False):
        fsync(Path(root))
    body = {"schema": SCHEMA, "name": name, "info": dict(info), "files": entries}
    (folder / MANIFEST).write_text(_render_manifest(body), encoding="utf-8")
    fsync(folder / MANIFEST)
    fsync(folder)


def _render_manifest(body: Mapping[str, Any]) -> str:
    """The manifest's only valid text, with a digest of itself: a change of any byte of it shows."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
        body = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        raise CheckpointError(f"{file}: expected a manifest of schema {SCHEMA}")
    body.pop("sha256", None)
    if text != _render_manifest(body):
        raise CheckpointError(f"{file}: differs from what was written (its sha256 does not fit)")
    if not isinstance(body.get("files"), list) or not isinstance(body.get("info"), dict):
        raise CheckpointError(f"{file}: expected the keys files and info")
    for entry in body["files"]:
        if not isinstance(entry, dict) or set(entry) != {"path", "size", "sha256"}:
            raise CheckpointError(f"{file}: expected files with path, size and sha256, found {entry!r}")
        inside = PurePosixPath(str(entry["path"]))
        if inside.is_absolute() or ".." in inside.parts:
            raise CheckpointError(f"{file}: path {entry['path']!r} leads out of the checkpoint")
    return body


def _verify_file(folder: Path, name: str, expected: Mapping[str, Any] | None, found: Path | None) -> None:
    if found is None or expected is None:
        raise CheckpointError(f"{folder}: {name} is {'missing' if found is None else 'not in the manifest'}")
    size = found.stat().st_size
    if size != expected["size"]:
        raise CheckpointError(f"{found}: expected {expected['size']} bytes, found {size}")
    digest = _sha256(found)
    if digest != expected["sha256"]:
        raise CheckpointError(f"{found}: expected sha256 {expected['sha256']}, found {digest}")


def _plain_files(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its relative path. Links, devices and unreadable folders are errors."""

    def fail(error: OSError) -> None:
        raise error

    found: dict[str, Path] = {}
    for root, folders, names in os.walk(folder, onerror=fail):
        for path in (Path(root, name) for name in (*folders, *names)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path}: expected a plain file, found a link or a device; remove it")
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return found


def _weight_version(path: Path) -> float | None:
    """For ordering only. One with a damaged or missing manifest counts as the newest: `latest` reports it.

    None where the manifest is there and cannot be read, which may pass.
    """
    try:
        return int(_read_manifest(path)["info"]["weight_version"])
    except CheckpointError as error:
        cause = error.__cause__
        return None if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) else math.inf
    except (KeyError, TypeError, ValueError):
        return math.inf


def _score(path: Path, metric: str) -> float | None:
    """What its info says of it by a metric, where it says anything."""
    with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):
        score = _read_manifest(path)["info"]["score"]
        value = float(score["value"])
        return value if score["metric"] == metric and math.isfinite(value) else None
    return None


def _size(path: Path) -> int:
    """Bytes of a checkpoint; 0 where its manifest cannot be read."""
    with contextlib.suppress(CheckpointError, TypeError, ValueError):
        return sum(int(entry["size"]) for entry in _read_manifest(path)["files"])
    return 0


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cannot_write(name: str, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free disk space" if full else "check the folder of run.dir"
    return CheckpointError(
        f"checkpoint {name} could not be written: {error}; {advice}. Earlier checkpoints are untouched"
    )


class RunLock:
    """Exclusive use of a run directory, as a context manager.

    The kernel drops the lock with the process, however it ends. The file keeps the owner's pid, host and uuid
    for the message that a second run gets.

    Raises (on entering):
        ConfigError: another process holds the lock, or `run.dir` cannot be used.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = RunDirectory(run_dir).lock
        self.owner = {"pid": os.getpid(), "host": socket.gethostname(), "uuid": uuid.uuid4().hex}
        self._descriptor = -1

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(self.owner).encode(), 0)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConfigError(
                f"run.dir: {self.path.parent} is in use by {self._describe_owner()}; "
                f"stop that run or choose another run.dir"
            ) from None
        except OSError as error:
            raise ConfigError(f"run.dir: {self.path} cannot be locked: {error}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _describe_owner(self) -> str:
        for _ in range(50):  # the owner may be between locking the file and writing itself into it
            try:
                owner = json.loads(self.path.read_text(encoding="utf-8"))
                return f"process {owner['pid']} on {owner['host']}"
            except (OSError, ValueError, KeyError, TypeError):
                time.sleep(0.02)
        return "another process"


def state_to_json(state: RunState) -> dict[str, Any]:
    """A run state as JSON-able values; `state_from_json` gives it back equal."""
    return {**asdict(state), "in_flight": list(state.in_flight), "counters": dict(state.counters)}


def state_from_json(value: Any) -> RunState:
    """Read a run state strictly.

    Raises:
        CheckpointError: a key is missing, unknown or of the wrong type.
    """
    names = {field.name for field in fields(RunState)}
    if not isinstance(value, dict) or set(value) != names:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"run state: expected the keys {sorted(names)}, found {found}")
    in_flight, counters = value["in_flight"], value["counters"]
    integers = [value[name] for name in ("stage", "step", "weight_version", "cursor")]
    if not isinstance(in_flight, list) or not all(_is_count(item) for item in [*integers, *in_flight]):
        raise CheckpointError(f"run state: expected integers from 0 on, found {integers}, in_flight {in_flight!r}")
    if not isinstance(counters, dict) or not all(type(item) in (int, float) for item in counters.values()):
        raise CheckpointError(f"run state: expected counters to be numbers by name, found {counters!r}")
    return RunState(**{**value, "in_flight": tuple(in_flight)})


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
