"""What can be seen of the processes of a run from outside, and what planted words can be found where."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from real_runs import LOOPBACK, Command, marked

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


@dataclass(frozen=True, slots=True)
class Seen:
    """A process at one moment. listening, connected: addresses of its IP sockets."""

    line: str
    environment: Mapping[str, str]
    listening: tuple[str, ...]
    connected: tuple[str, ...]

    @property
    def from_ray(self) -> bool:
        """Whether Ray started it: as a service of its own, or to run a class of ours."""
        return "/ray/" in self.line or self.line.startswith("ray::")


def look(command: Command) -> list[Seen]:
    """All processes of a command, verifiers too, which inherit no mark."""
    found: dict[int, psutil.Process] = {}
    for process in marked(command.mark):
        found[process.pid] = process
        for child in process.children(recursive=True):
            found[child.pid] = child
    return [seen for process in found.values() if (seen := _look_at(process)) is not None]


def _look_at(process: psutil.Process) -> Seen | None:
    """None where it is gone, or has not become its own program yet."""
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
