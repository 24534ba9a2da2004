"""Find the processes of a job in a storm by their environment, limit their files, and damage a checkpoint."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from rlsys.errors import CheckpointError
from rlsys.run.manifest import verify_checkpoint

# Environment variables that all processes of a run inherit. A verifier inherits only the second one.
MARK, RUN_ID = "RLSYS_CHAOS_MARK", "RLSYS_RUN_ID"
TITLES = {"actor": "ray::RolloutActor", "rank": "ray::LearnerActor"}
VERIFIER = "actors.verifiers.worker"


def marked(name: str, value: str) -> Iterator[psutil.Process]:
    """Yield the processes with `name=value`, or `name=value.N` of its N-th start, in their environment; no zombies."""
    wanted, more = f"{name}={value}".encode(), f"{name}={value}.".encode()
    for pid in psutil.pids():
        try:
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(entry == wanted or entry.startswith(more) for entry in entries):
                yield psutil.Process(pid)
        except (OSError, psutil.NoSuchProcess):
            continue


def running(kind: str, mark: str) -> list[psutil.Process]:
    """Return the actors, ranks or reward workers that carry a mark and are not stopped, ordered by process id.

    A reward worker consists of two processes: the verifier and the parent that watches it.
    """
    if kind in TITLES:
        ours = [process for process in marked(MARK, mark) if line(process).startswith(TITLES[kind])]
    else:
        ours = [child for actor in running("actor", mark) for child in _children(actor) if VERIFIER in line(child)]
    return sorted((each for each in ours if status(each) not in ("", psutil.STATUS_STOPPED)), key=lambda each: each.pid)


def line(process: psutil.Process) -> str:
    """Return the command line, which Ray replaces by a title; "" if the process is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def status(process: psutil.Process) -> str:
    """Return the status that psutil reports; "" if the process is gone."""
    with contextlib.suppress(psutil.Error):
        return process.status()
    return ""


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or status(process) in ("", psutil.STATUS_ZOMBIE)


def kill_and_wait(processes: Sequence[psutil.Process], limit_s: float) -> None:
    """Send SIGKILL to processes and wait at most `limit_s` seconds until they are gone. Zombies count as gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    limit = time.monotonic() + limit_s
    while not all(map(is_gone, processes)) and time.monotonic() < limit:
        time.sleep(0.05)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def limit_files(processes: Sequence[psutil.Process], limit: int) -> None:
    """Limit the files of processes to `limit` bytes, so that writing fails as on a full disk; -1 removes the limit."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            soft = hard if limit < 0 or 0 <= hard < limit else limit
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))


def valid_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints that match their manifest, the newest last."""
    return [path for _, path in _versions(run_dir)]


def saved_version(run_dir: Path) -> int:
    """Return the weight version of the newest valid checkpoint; 0 without one."""
    return max((version for version, _ in _versions(run_dir)), default=0)


def _versions(run_dir: Path) -> list[tuple[int, Path]]:
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        with contextlib.suppress(CheckpointError, OSError):
            found.append((verify_checkpoint(path)["weight_version"], path))
    return sorted(found)


def flip_a_bit(checkpoint: Path, draw: float) -> str:
    """Flip a bit in a file of a checkpoint, and return a description of the place.

    The file is replaced, because it can be a hard link to a file of an exported policy.

    Args:
        checkpoint: The checkpoint folder.
        draw: Random number in [0, 1) that decides the file and the byte.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[int(draw * len(files))]
    content = bytearray(path.read_bytes())
    place = int(draw * len(files) % 1 * len(content))
    content[place] ^= 1
    path.unlink()
    path.write_bytes(content)
    return f"a bit of byte {place} of {path.relative_to(checkpoint.parent)}"
