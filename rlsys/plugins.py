"""Objects of the user's own code, named by `module:name` or `file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from rlsys.errors import ConfigError


def _is_name(text: str) -> str:
    if not re.fullmatch(r"[^:]+:[A-Za-z_][A-Za-z0-9_.]*", text):
        raise ValueError(f"expected `module:name` or `file.py:name`, found {text!r}")
    return text


PluginName = Annotated[str, AfterValidator(_is_name)]
"""`module:name`, or the path of a Python file and a name: `rewards.py:brevity`."""


FOLDER = "RLSYS_FOLDER"
"""Environment variable of learner ranks: the folder in which the command was started."""


def command_folder() -> str:
    """Return the folder in which the command was started, also in a process that it has started elsewhere."""
    return os.environ.get(FOLDER) or os.getcwd()


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
    source, _, attribute = name.partition(":")
    try:
        module = _file_module(Path(folder) / source) if source.endswith(".py") else _module(source, folder)
    except Exception as error:
        where = f", also looked for in {folder}" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(
            f"{field} {name!r}: cannot import {source}: {type(error).__name__}: {error}{where}"
        ) from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            known = ", ".join(each for each in vars(module) if not each.startswith("_")) or "nothing"
            raise ConfigError(f"{field} {name!r}: {source} has no {attribute!r}; it has {known[:300]}")
        value = getattr(value, part)
    return value


def _module(name: str, folder: str) -> Any:
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file of the user hides no installed package
    return importlib.import_module(name)


def _file_module(path: Path) -> Any:
    """Import a file under a name of its own, once."""
    name = f"rlsys_plugin_{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
