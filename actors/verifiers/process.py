"""The actor's handle of a verifier process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import site
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlsys.deadlines import within

READ_BYTES = 1 << 16
# If the actor itself was delayed past a deadline, the answer may already be in the pipe.
LATE_READ_S = 0.05
# Within milliseconds, the guard ends every process that a verifier started, unless the guard was stopped or killed.
# With all these limits, a verification ends within a second of its deadline if cores are free.
GUARD_PATIENCE_S, KILL_PATIENCE_S, STDERR_PATIENCE_S = 0.6, 0.1, 0.1
_STDERR_BYTES = 4096
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "RLSYS_DATA", "RLSYS_RUN_ID", "NLTK_DATA")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierProcess:
    """A running verifier process; see `actors.verifiers.worker`.

    Attributes:
        stderr_tail: Task that reads stderr until it is closed and returns its last bytes.
        folder: Temporary working and home folder of the process.
    """

    process: Process
    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    stderr_tail: asyncio.Task[bytes]
    folder: str

    @property
    def exit_status(self) -> int | None:
        """Exit status, negative for a signal; None while the process runs."""
        return self.process.returncode

    def write(self, *messages: Any) -> None:
        # No drain: a worker that reads nothing would block it past the deadline. PIPELINE_ITEMS bounds the memory.
        self.stdin.write(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

    async def read(self, timeout_s: float) -> bytes | None:
        """Return output of the process: b"" if it ended, None if it wrote nothing before the deadline.

        A pause of the whole machine does not count against the process.
        """
        for patience in (timeout_s, LATE_READ_S):
            with suppress(TimeoutError):
                return await within(self.stdout.read(READ_BYTES), patience)
        return None

    async def end(self, patience_s: float = 0.0) -> str:
        """End the process and everything that it started.

        Args:
            patience_s: Seconds in which the process may end by itself before it is killed.

        Returns:
            Exit status and the last lines of stderr of the process.
        """
        await self._wait(patience_s)
        self._send(os.kill, signal.SIGTERM)  # to the guard, which knows the processes below it
        await self._wait(GUARD_PATIENCE_S)
        self._send(os.killpg, signal.SIGKILL)
        await self._wait(KILL_PATIENCE_S)
        # A process that escaped from a killed guard may keep stderr open for ever.
        await asyncio.wait([self.stderr_tail], timeout=STDERR_PATIENCE_S)
        self.stderr_tail.cancel()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        is_read = self.stderr_tail.done() and not self.stderr_tail.cancelled()
        lines = self.stderr_tail.result().decode(errors="replace").strip().splitlines()[-3:] if is_read else []
        return "; ".join([f"exit status {self.exit_status}", *map(str.strip, lines)])

    async def _wait(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.process.wait()

    def _send(self, kill: Callable[[int, int], None], number: signal.Signals) -> None:
        if self.exit_status is None:
            with suppress(ProcessLookupError):
                kill(self.process.pid, number)


async def spawn() -> VerifierProcess:
    """Start a verifier process in a temporary folder."""
    folder = tempfile.mkdtemp(prefix="rl-verifier-")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "actors.verifiers.worker"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=_environment(folder),
        cwd=folder,
        start_new_session=True,
    )
    # The streams are None only without PIPE.
    stdin, stdout = cast(asyncio.StreamWriter, process.stdin), cast(asyncio.StreamReader, process.stdout)
    stderr_tail = asyncio.create_task(_tail(cast(asyncio.StreamReader, process.stderr)))
    return VerifierProcess(process=process, stdin=stdin, stdout=stdout, stderr_tail=stderr_tail, folder=folder)


async def _tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while data := await stream.read(READ_BYTES):
        tail = (tail + data)[-_STDERR_BYTES:]
    return tail


def _environment(folder: str) -> dict[str, str]:
    """Return the environment of a verifier, without credentials in its variables or its home folder.

    PYTHONPATH has absolute paths, so that the process finds our packages from its temporary folder.
    """
    variables = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    python_path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    paths = [Path(__file__).resolve().parents[2], *map(Path, python_path)]
    variables |= {"HOME": folder, "TMPDIR": folder, "PYTHONUSERBASE": site.getuserbase()}
    # One thread each: numpy's thread pools would only use up the address space.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return variables | threads | {"PYTHONPATH": os.pathsep.join(str(path.absolute()) for path in paths)}
