"""The processes and files of a job in a storm: found by what they inherited, limited, damaged."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from rlsys.errors import CheckpointError
from rlsys.run.manifest import verify_checkpoint

# Environment variables that all processes of a run inherit; a verifier's clean one has only the second.
MARK, RUN_ID = "RLSYS_CHAOS_MARK", "RLSYS_RUN_ID"
TITLES = {"actor": "ray::RolloutActor", "rank": "ray::LearnerActor"}
VERIFIER = "actors.verifiers.worker"


def marked(name: str, value: str) -> Iterator[psutil.Process]:
    """Processes that inherited `name=value`, or one of its starts, `name=value.N`; no zombies."""
    wanted, more = f"{name}={value}".encode(), f"{name}={value}.".encode()
    for pid in psutil.pids():
        try:
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(entry == wanted or entry.startswith(more) for entry in entries):
                yield psutil.Process(pid)
        except (OSError, psutil.NoSuchProcess):
            continue


def running(what: str, mark: str) -> list[psutil.Process]:
    """Actors, ranks or reward workers that carry a mark and are not stopped, in the order of their ids.

    A reward worker is two processes: the verifier, and the one above that watches over it.
    """
    if what in TITLES:
        ours = [process for process in marked(MARK, mark) if line(process).startswith(TITLES[what])]
    else:
        ours = [child for actor in running("actor", mark) for child in _children(actor) if VERIFIER in line(child)]
    return sorted((each for each in ours if status(each) not in ("", psutil.STATUS_STOPPED)), key=lambda each: each.pid)


def line(process: psutil.Process) -> str:
    """The command line, which Ray sets to a title; empty where the process is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def status(process: psutil.Process) -> str:
    """As psutil names it; empty where the process is gone."""
    with contextlib.suppress(psutil.Error):
        return process.status()
    return ""


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or status(process) in ("", psutil.STATUS_ZOMBIE)


def kill_and_wait(processes: Sequence[psutil.Process], limit_s: float) -> None:
    """SIGKILL processes and wait until they are gone, at most `limit_s`. Zombies count as gone."""
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
    """Let no file of the processes grow past `limit` bytes; -1 lifts it. Writing then fails as on a full disk."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            soft = hard if limit < 0 or 0 <= hard < limit else limit
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))


def valid_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints that fit their manifest, the newest last."""
    return [path for _, path in _versions(run_dir)]


def saved_version(run_dir: Path) -> int:
    """The weight version of the newest of them, 0 where there is none."""
    return max((version for version, _ in _versions(run_dir)), default=0)


def _versions(run_dir: Path) -> list[tuple[int, Path]]:
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        with contextlib.suppress(CheckpointError, OSError):
            found.append((verify_checkpoint(path)["weight_version"], path))
    return sorted(found)


def flip_a_bit(checkpoint: Path, draw: float) -> str:
    """Flip a bit of a file of a checkpoint; says where.

    The file is replaced: as a hard link it may be a file of the policy that a stage handed over, too.

    Args:
        draw: in [0, 1); decides file and bit.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[int(draw * len(files))]
    content = bytearray(path.read_bytes())
    place = int(draw * len(files) % 1 * len(content))
    content[place] ^= 1
    path.unlink()
    path.write_bytes(content)
    return f"a bit of byte {place} of {path.relative_to(checkpoint.parent)}"
