"""Where a run may begin: the folder of its own checkpoints, and the path that run.resume names."""

from __future__ import annotations

import re
from pathlib import Path

from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import read_json
from rlsys.run.checkpoints import MANIFEST, CheckpointStore


def check_folders(folder: Path) -> None:
    """What others put beside the checkpoints is refused: it would be taken for damaged ones, which are removed."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        foreign = path.is_dir() and not path.name.startswith(".") and not re.match(r"step_\d", path.name)
        if foreign and not (path / MANIFEST).exists():
            raise ConfigError(
                f"run.dir {folder.parent}: expected checkpoints of rlsys alone in {folder}, found the folder "
                f"{path.name} without a {MANIFEST}; move it away, or choose another run.dir"
            )


def check_named(path: Path, store: CheckpointStore) -> None:
    """run.resume names a valid checkpoint."""
    wanted = "expected auto, never or the folder of a checkpoint, RUN_DIR/checkpoints/step_N"
    if not (path / MANIFEST).is_file():
        inside = [path / "checkpoints", path] if path.is_dir() else []
        found = sorted(each.parent for folder in inside for each in folder.glob(f"*/{MANIFEST}"))
        what = "a file" if path.is_file() else "no such folder" if not path.is_dir() else f"a folder without {MANIFEST}"
        hint = f"; did you mean {found[-1]}?" if found else ""
        raise ConfigError(f"run.resume {path}: {wanted}, found {what}{hint}")
    try:
        store.verify(path)
    except CheckpointError as error:
        raise ConfigError(f"run.resume: {error.message}; choose another checkpoint, or restore this one") from None


def check_unused(path: Path, own: Path | None, run_dir: Path) -> None:
    """Nothing that a run of another line left in run_dir may be overwritten or mixed with this one's."""
    if own is not None and own.resolve() == path.resolve():
        return
    if own is not None and own.resolve().parent == path.resolve().parent:
        raise ConfigError(
            f"run.resume {path}: {own} is newer; move the newer ones out of {own.parent}, or choose a new run.dir"
        )
    if own is not None or has_metrics(run_dir):
        raise ConfigError(
            f"run.resume {path}: run.dir {run_dir} holds another run; move it away, or choose a new run.dir"
        )


def has_metrics(run_dir: Path) -> bool:
    return RunDirectory(run_dir).metrics.exists()


def resumed_from(run_dir: Path) -> str | None:
    file = RunDirectory(run_dir).resumed_from
    if not file.exists():
        return None
    try:
        return str(read_json(file)["checkpoint"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{file}: damaged: expected a checkpoint; restore it, or start a new run.dir") from None
