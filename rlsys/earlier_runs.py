"""Say which run writes a path that a config names and that does not exist yet."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from rlsys.errors import ConfigError

CONFIGS = Path("configs")
"""Folder in which configs are looked up, relative to the folder of the command."""
SCRIPTS = {
    "runs/models/smollm2-135m-instruct": "benchmarks/real_model.py",
    "runs/data/arithmetic": "benchmarks/arithmetic.py",
}
"""Paths that shipped configs name, and the scripts that make them."""
_RUN_DIR = re.compile(r"\bdir:\s*[\"']?([^\s\"',}]+)")
_LOCAL = re.compile(r"^(/|\.{1,2}/|~|runs/)|/.*/|/(stages|checkpoints)(/|$)")


def is_local(name: str) -> bool:
    """Return whether a name can only be a path here, and no id on the hub."""
    return bool(_LOCAL.search(name))


def check_run_folder(path: Path) -> None:
    """Raise ConfigError with a hint if the folder of a run does not exist; see `origin`."""
    if not path.exists():
        raise ConfigError(f"{path}: no such folder{origin(str(path))}")


def origin(name: str, *, is_file: bool = False) -> str:
    """Return the end of a message about a missing path: the command that writes it, or "" if unknown.

    Args:
        name: the path.
        is_file: whether the name can only be a file here, whatever it looks like.
    """
    path = Path(name)
    inner = next((each for each in path.parents if each.name in ("stages", "checkpoints", "data")), None)
    run_dir = inner.parent if inner else path
    if (run_dir / "config.yaml").is_file() and inner is not None:
        there = ", ".join(sorted(each.name for each in inner.glob("*") if not each.name.startswith("."))) or "nothing"
        command = f"`rlsys extract {run_dir}` writes data" if inner.name == "data" else "its command continues it"
        return f"; the run {run_dir} has {there} in {inner.name}: {command}"
    config = _config_of(run_dir)
    if config is None:
        script = next((SCRIPTS[str(each)] for each in (path, *path.parents) if str(each) in SCRIPTS), None)
        return f"; `python {script}` makes it" if script else _similar(path) or _relative(path, is_file)
    command = f"`rlsys train {config}`"
    if inner is not None and inner.name == "data":
        command = f"`rlsys search {config}` and `rlsys extract {run_dir}`"
    return f"; {run_dir} does not exist: first run {command}"


def _relative(path: Path, is_file: bool) -> str:
    """Return where a relative path was looked up, or "" for another path."""
    if path.is_absolute() or not (is_file or is_local(str(path))):
        return ""
    if is_file:
        return f"; it is relative to the current folder {Path.cwd()}: change to its folder, or give an absolute path"
    return (
        f"; it is relative to the current folder {Path.cwd()}: run the command in the folder where the run was started"
    )


def _similar(path: Path) -> str:
    """Return a hint at a path beside a misspelt one, or ""."""
    if path.exists():
        return ""
    wrong = next((each for each in (path, *path.parents) if each.parent.is_dir() and not each.exists()), path)
    try:
        names = [each.name for each in wrong.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(wrong.name, names, n=1)
    return f"; did you mean {wrong.with_name(close[0])}?" if close else ""


def _config_of(run_dir: Path) -> Path | None:
    """Return the config in CONFIGS whose run directory this is."""
    for config in sorted(CONFIGS.glob("*.yaml")):
        try:
            named = _RUN_DIR.search(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        if named and Path(named[1]) == run_dir:
            return config
    return None
