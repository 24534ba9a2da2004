"""Write and verify the manifest of a checkpoint.

MANIFEST.json, written last, names every file of the checkpoint with its size and sha256. The digests guard against
accidents, not against an attacker: a run directory is trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rlsys.errors import CheckpointError, DamagedFileError
from rlsys.files import fsync

MANIFEST = "MANIFEST.json"
SCHEMA = 1


def seal(folder: Path, name: str, info: Mapping[str, Any]) -> None:
    """Write every file of a folder to disk, the manifest last.

    Args:
        name: name of the checkpoint.
        info: facts about the checkpoint, JSON-able.
    Raises:
        CheckpointError: the folder holds a link, a device or a manifest.
        OSError: it cannot be written.
    """
    files = _plain_files(folder)
    if MANIFEST in files:
        raise CheckpointError(f"{folder}: a writer made {MANIFEST}, a name that is reserved for the manifest")
    entries = [
        {"path": path, "size": file.stat().st_size, "sha256": _sha256(file)} for path, file in sorted(files.items())
    ]
    for file in files.values():
        fsync(file)
    for root, _, _ in os.walk(folder, topdown=False):
        fsync(Path(root))
    body = {"schema": SCHEMA, "name": name, "info": dict(info), "files": entries}
    (folder / MANIFEST).write_text(render_manifest(body), encoding="utf-8")
    fsync(folder / MANIFEST)
    fsync(folder)


def render_manifest(body: Mapping[str, Any]) -> str:
    """Return the only valid text of a manifest. Its own digest reveals a change of any byte."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint in a folder, without checking the other files.

    Raises:
        DamagedFileError: it cannot be read, or is damaged. The cause is an OSError if the file cannot be read now.
    """
    file = path / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
        body = json.loads(text)
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{file}: cannot be read: {error}") from error
    schema = body.get("schema") if isinstance(body, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise DamagedFileError(
            f"{file}: expected schema {SCHEMA}, found {schema} of a newer rlsys; restore an older checkpoint, or use "
            "that version of rlsys"
        )
    if schema != SCHEMA:
        raise DamagedFileError(f"{file}: expected a manifest of schema {SCHEMA}")
    body.pop("sha256", None)
    if text != render_manifest(body):
        raise DamagedFileError(f"{file}: differs from what was written (its sha256 does not fit)")
    if not isinstance(body.get("files"), list) or not isinstance(body.get("info"), dict):
        raise DamagedFileError(f"{file}: expected the keys files and info")
    for entry in body["files"]:
        if not isinstance(entry, dict) or set(entry) != {"path", "size", "sha256"}:
            raise DamagedFileError(f"{file}: expected files with path, size and sha256, found {entry!r}")
        inside = PurePosixPath(str(entry["path"]))
        if inside.is_absolute() or ".." in inside.parts:
            raise DamagedFileError(f"{file}: path {entry['path']!r} leads out of the checkpoint")
    return body


def verify_checkpoint(path: Path, parts: Collection[str] = ()) -> dict[str, Any]:
    """Check the files of a checkpoint against its manifest, and return the manifest's `info`.

    Args:
        parts: the files and folders of the checkpoint to check; none of them stands for all.

    Raises:
        DamagedFileError: names the first file that is missing, additional or different.
    """
    manifest = read_manifest(path)
    expected = {entry["path"]: entry for entry in manifest["files"]}
    try:
        files = _plain_files(path)
        files.pop(MANIFEST)
        for name in sorted(expected.keys() | files.keys()):
            if parts and PurePosixPath(name).parts[0] not in parts:
                continue
            _verify_file(path, name, expected.get(name), files.get(name))
    except OSError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error}") from error
    return dict(manifest["info"])


def verify_chosen(path: Path, parts: Collection[str] = ()) -> None:
    """Check a checkpoint that the user has named, as `verify_checkpoint` does; the message also has a remedy."""
    try:
        verify_checkpoint(path, parts)
    except CheckpointError as error:
        message = f"{error.message}; choose another checkpoint, or restore this one"
        raise DamagedFileError(message) from error.__cause__


def _verify_file(folder: Path, name: str, entry: Mapping[str, Any] | None, file: Path | None) -> None:
    if file is None or entry is None:
        raise DamagedFileError(f"{folder}: {name} is {'missing' if file is None else 'not in the manifest'}")
    size = file.stat().st_size
    if size != entry["size"]:
        raise DamagedFileError(f"{file}: expected {entry['size']} bytes, found {size}")
    digest = _sha256(file)
    if digest != entry["sha256"]:
        raise DamagedFileError(f"{file}: expected sha256 {entry['sha256']}, found {digest}")


def _plain_files(folder: Path) -> dict[str, Path]:
    """Return every file in a folder and its subfolders, by relative path. Links and devices are errors."""

    def fail(error: OSError) -> None:
        raise error

    files: dict[str, Path] = {}
    for root, folders, names in os.walk(folder, onerror=fail):
        for path in (Path(root, name) for name in (*folders, *names)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path}: expected a plain file, found a link or a device; remove it")
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
    return files


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
