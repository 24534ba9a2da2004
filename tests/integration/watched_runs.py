"""Observations of the processes of a run from outside, and a search for planted words in files."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from real_runs import LOOPBACK, Command, FinishedRun, marked

# Tells of every connection that Python code asks for, in every process of a run that finds it on its path.
AUDIT = """
import os, sys

def _hook(event, arguments, log={log!r}):
    if event == "socket.connect":
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, (repr(arguments[1]) + "\\n").encode())
        os.close(descriptor)

sys.addaudithook(_hook)
"""


SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "RAY_AUTH_TOKEN")
PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin")


def new_secrets() -> dict[str, str]:
    return {name: f"canary-{uuid.uuid4().hex}" for name in SECRETS}


def planted(secrets: Mapping[str, str]) -> dict[str, str]:
    """The environment of a user with secrets, who is online and has turned on what must be off."""
    more = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "HF_HUB_OFFLINE": "0", "RAY_ADDRESS": "10.0.0.1:6379"}
    return {**secrets, **more}


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.path), "w"))


@dataclass(frozen=True, slots=True)
class Seen:
    """A process at one moment. `listening` and `connected` are addresses of its IP sockets."""

    line: str
    environment: Mapping[str, str]
    listening: tuple[str, ...]
    connected: tuple[str, ...]

    @property
    def from_ray(self) -> bool:
        """Whether Ray started it: as a service of its own, or to run a class of ours."""
        return "/ray/" in self.line or self.line.startswith("ray::")


@dataclass(frozen=True, slots=True)
class Watched:
    """A run beside planted secrets and pickles. ray: what was found in Ray's folder while it ran.

    unpickled: a file that is there where a planted pickle was opened. connections: an argument of every connect.
    """

    finished: FinishedRun
    secrets: Mapping[str, str]
    seen: Sequence[Seen]
    own_tokens: Sequence[str]
    ray_hits: Sequence[str]
    ray_files: int
    ray_open: Sequence[str]
    connections: Sequence[str]
    unpickled: Path


def look(command: Command) -> list[Seen]:
    """All processes of a command, verifiers too, which inherit no mark."""
    found: dict[int, psutil.Process] = {}
    for process in marked(command.mark):
        found[process.pid] = process
        for child in process.children(recursive=True):
            found[child.pid] = child
    return [seen for process in found.values() if (seen := _look_at(process)) is not None]


def _look_at(process: psutil.Process) -> Seen | None:
    """Return None if the process is gone, or is a fork that has not started its program yet."""
    try:
        line, environment = " ".join(process.cmdline()), process.environ()
        sockets = process.net_connections("inet")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    bound = {found.laddr.ip for found in sockets if found.laddr and not found.raddr}
    connected = {found.raddr.ip for found in sockets if found.raddr}
    return Seen(line, environment, tuple(sorted(bound)), tuple(sorted(connected))) if line else None


def beyond_loopback(addresses: Sequence[str]) -> list[str]:
    return [address for address in addresses if not LOOPBACK.fullmatch(address)]


def files_with(folder: Path, words: Sequence[str]) -> tuple[list[str], int]:
    """Files below a folder that hold one of the words, in their bytes or their names, and how many were read."""
    found, count = [], 0
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names):
            try:
                if not stat.S_ISREG(path.lstat().st_mode):
                    continue
                content = path.read_bytes()
            except OSError:  # gone, while the run goes on
                continue
            count += 1
            found += [str(path) for word in words if word.encode() in content or word in str(path)]
    return found, count


def open_to_others(folder: Path) -> list[str]:
    """Everything below a folder, and itself, that its group or others may read, write or enter; links do not count."""
    paths = [folder, *(Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files))]
    found = []
    for path in paths:
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue
        if not stat.S_ISLNK(mode) and mode & 0o077:
            found.append(f"{stat.filemode(mode)} {path}")
    return found
