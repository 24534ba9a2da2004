"""Objects of the user's own code, named by `module:name` or `file.py:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from rlsys.errors import ConfigError


def _is_name(text: str) -> str:
    if not re.fullmatch(r"[^:]+:[A-Za-z_][A-Za-z0-9_.]*", text):
        raise ValueError("expected `module:name` or `file.py:name`")
    return text


PLUGIN_VALIDATOR = AfterValidator(_is_name)
PluginName = Annotated[str, PLUGIN_VALIDATOR]
"""`module:name`, or the path of a Python file and a name: `rewards.py:brevity`."""


PLUGIN = "plug-in "
"""Beginning of the name of a digest in `plugin_digests`."""
MAX_MESSAGE_CHARS = 400
_PACKAGES = Path(__file__).resolve().parents[1]
_NOT_THE_USERS = (
    *(f"{_PACKAGES / name}{os.sep}" for name in ("rlsys", "actors", "learners")),
    *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    "<",  # frozen modules and code that was made at run time
)
"""Beginnings of the paths of files that no user of rlsys writes."""
FOLDER = "RLSYS_FOLDER"
"""Environment variable of learner ranks: the folder in which the command was started."""


def command_folder() -> str:
    """Return the folder in which the command was started, also in a process that it has started elsewhere."""
    return os.environ.get(FOLDER) or os.getcwd()


def plugin_digests(values: Any, folder: str) -> dict[str, str]:
    """Return the sha256 of every source file that a config names, by "plug-in SOURCE".

    Args:
        values: the config, or a part of it, as plain values.
        folder: see `load_plugin`.
    """
    if not isinstance(values, Mapping | list | tuple):
        return {}
    digests: dict[str, str] = {}
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if key in ("fn", "estimator") and isinstance(value, str) and ":" in value:
            source = value.partition(":")[0]
            digests[f"{PLUGIN}{source}"] = _source_digest(source, folder)
        digests |= plugin_digests(value, folder)
    return digests


def _source_digest(source: str, folder: str) -> str:
    """Return the sha256 of a file or of the file of a module; "" if there is none to read."""
    try:
        spec = None if source.endswith(".py") else _found(source, folder)
        path = Path(folder) / source if spec is None else Path(spec.origin or "")
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ImportError, ValueError):
        return ""  # `load_plugin` says what is wrong


def _found(name: str, folder: str) -> Any:
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file of the user hides no installed package
    return importlib.util.find_spec(name)


def check_sources(values: Any, folder: str, field: str = "") -> None:
    """Raise ConfigError if a config names a Python file or module that does not exist. None is imported.

    Args:
        values: the config, or a part of it, as plain values.
        folder: see `load_plugin`.
        field: dotted name of the part, for error messages.
    """
    if not isinstance(values, Mapping | list | tuple):
        return
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        name = f"{field}.{key}" if field else str(key)
        if key in ("fn", "estimator") and isinstance(value, str) and ":" in value:
            _check_source(value, folder, name)
            top = value.partition(":")[0].partition(".")[0]
            if (
                top
                and not value.partition(":")[0].endswith(".py")
                and top not in sys.modules
                and not _found(top, folder)
            ):
                raise ConfigError(f"{name} {value!r}: cannot import {top}: no such module, also looked for in {folder}")
        check_sources(value, folder, name)


def _check_source(name: str, folder: str, field: str) -> None:
    """Raise ConfigError if the Python file of a name does not exist; see `load_plugin`."""
    source = name.partition(":")[0]
    if source.endswith(".py") and not (Path(folder) / source).is_file():
        raise ConfigError(f"{field} {name!r}: cannot import {source}: no such file {Path(folder) / source}")


def load_function(name: str, folder: str, field: str) -> Callable[..., Any]:
    """Return a function; see `load_plugin`.

    Raises:
        ConfigError: as `load_plugin`, or the object is no function.
    """
    function = load_plugin(name, folder, field)
    if not callable(function) or inspect.isclass(function):
        raise ConfigError(f"{field} {name!r}: expected a function, found {type(function).__name__}")
    return function


def load_plugin(name: str, folder: str, field: str) -> Any:
    """Return the object with a name. Its module is imported.

    Args:
        name: see `PluginName`.
        folder: folder in which the command was started: relative files are looked up there, and modules that are not
            installed.
        field: field of the config, for error messages.

    Raises:
        ConfigError: the module cannot be imported, or has no such object.
    """
    _check_source(name, folder, field)
    source, _, attribute = name.partition(":")
    try:
        module = _file_module(Path(folder) / source) if source.endswith(".py") else _module(source, folder)
    except (Exception, SystemExit) as error:
        where = f", also looked for in {folder}" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"{field} {name!r}: cannot import {source}: {raised_text(error)}{where}") from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            own = [each for each, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            known = ", ".join(each for each in own if not each.startswith("_")) or "no function or class of its own"
            raise ConfigError(f"{field} {name!r}: {source} has no {attribute!r}; it has {known[:300]}")
        value = getattr(value, part)
    return value


def raised_text(error: BaseException) -> str:
    """Return type and message of an exception, and the innermost line of the user's code that it comes from."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(file, line) for file, line in frames if not file.startswith(_NOT_THE_USERS)]
    place = f" ({Path(own[-1][0]).name}:{own[-1][1]})" if own else ""
    return f"{type(error).__name__}: {str(error)[:MAX_MESSAGE_CHARS]}{place}"


def _module(name: str, folder: str) -> Any:
    _found(name.partition(".")[0], folder)
    return importlib.import_module(name)


def _file_module(path: Path) -> Any:
    """Import a file under a name of its own, once."""
    name = f"rlsys_plugin_{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
