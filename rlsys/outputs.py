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
        raise ConfigError(f"{option} {path}: cannot be read: {error.strerror}; choose another name") from None
    if not replaceable:
        raise ConfigError(f"{option} {path}: the file exists; choose another name, or replace it with --overwrite")
