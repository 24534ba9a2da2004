"""Outputs of commands that exist already: a command replaces only what it wrote itself, or what the user names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlsys.errors import ConfigError


def check_file(path: Path, option: str, *, overwrite: bool, own: Callable[[bytes], bool] = lambda _: False) -> None:
    """Raise if a file exists that the command must not replace.

    Args:
        path: the file to write.
        option: the option that names it, for the message.
        overwrite: whether the user asked to replace it.
        own: whether content is that of a file which the same command wrote, and may replace without being asked.

    Raises:
        ConfigError: the path is a folder, or a file of something else.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {path}: expected the name of a file, found a folder; choose another name")
    if overwrite or not path.exists():
        return
    if not path.is_file():
        raise ConfigError(f"{option} {path}: expected the name of a file, found a device or pipe; choose another name")
    try:
        replaceable = own(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{option} {path}: exists and cannot be read: {error.strerror}; choose another name") from None
    if not replaceable:
        raise ConfigError(f"{option} {path}: the file exists; choose another name, or replace it with --overwrite")


def check_folder(path: Path, option: str, *, overwrite: bool, mark: str, replaces_own: bool = False) -> None:
    """Raise if a folder has files that the command must not replace.

    Args:
        path: the folder to write.
        option: the option that names it, for the message.
        overwrite: whether the user asked to replace it. A folder that the command did not write is never emptied.
        mark: name of a file by which the command knows its own folder.
        replaces_own: whether the command may replace its own folder without being asked.

    Raises:
        ConfigError: the path is a file, or a folder with something else in it.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{option} {path}: expected a new or empty folder, found a file; choose another name")
    if not any(path.iterdir()):
        return
    if not (path / mark).is_file():
        raise ConfigError(
            f"{option} {path}: expected a new or empty folder, found files in it that this command did not write; choose "
            "another name"
        )
    if not (overwrite or replaces_own):
        raise ConfigError(
            f"{option} {path}: expected a new or empty folder, found files in it; choose another name, or replace them "
            "with --overwrite"
        )
