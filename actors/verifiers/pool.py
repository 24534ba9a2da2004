"""Rewards: task verifiers in killable processes with a deadline.

Consumes (answer, completion) pairs of any number of concurrent callers; waits for a free worker process;
a hanging, crashing or greedy verification costs its own verdict and one process, nothing else.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import site
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rlsys.config.schema import RewardsConfig
from rlsys.config.tasks import TaskConfig
from rlsys.errors import EngineError
from rlsys.types import Outcome, Verdict

Item = tuple[str, str]
Tell = Callable[[Sequence[tuple[int, Verdict]]], None]
TellPart = Callable[[int, Sequence[Verdict]], None]  # how many verdicts came before, and the new ones

START_TIMEOUT_S = 60.0
# Items written to a worker at once: enough to hide the round trip, few enough to share among workers.
PIPELINE_ITEMS = 32
# Where this process itself was held up past a deadline, the answer may be waiting in the pipe.
LAST_LOOK_S = 0.05
# A worker that closed its pipe is about to end by itself; its exit status tells why.
EXIT_PATIENCE_S = 2.0
# The guard ends what a verifier has started within milliseconds; only one that was itself stopped or killed does not.
# Together these keep a verification within a second of its deadline where cores are free.
GUARD_PATIENCE_S, KILL_PATIENCE_S, LAST_WORDS_S = 0.6, 0.1, 0.1
_READ_BYTES = 1 << 16
_STDERR_BYTES = 4096
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "RLSYS_DATA", "RLSYS_RUN_ID")


class RewardPool:
    """`config.workers` verifier processes, started on first use. Use it from one event loop.

    The processes die with the thread that runs the event loop (Linux ties the death signal to it).

    Args:
        task_config: the task whose `verify` judges completions.
        seed: run.seed.
        config: number of workers, deadline and memory of one verification.
        verifier: "module:factory" to use instead of the task's verifier: the seam for tests and plug-ins.
    """

    def __init__(
        self, task_config: TaskConfig, seed: int, config: RewardsConfig, *, verifier: str | None = None
    ) -> None:
        hello: dict[str, Any] = {"parent": os.getpid(), "memory_mib": config.memory_mib, "seed": seed}
        hello |= {"verifier": verifier} if verifier else {"task": task_config.model_dump(mode="json")}
        self._workers = [_Worker(hello, config.timeout_s) for _ in range(config.workers)]
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()
        self.verdicts = 0  # so far
        for worker in self._workers:
            self._free.put_nowait(worker)

    async def start(self) -> None:
        """Start all workers now, so that a broken verifier is seen before the first rollout.

        Raises:
            EngineError: a worker did not come up; holds the last lines of its stderr.
        """
        await asyncio.gather(*(self._verify_part(()) for _ in self._workers))

    async def verify(self, items: Sequence[Item], tell: Tell | None = None) -> list[Verdict]:
        """Judge (answer, completion) pairs; the verdicts come in the same order.

        Args:
            tell: is called with number and verdict of some pairs as soon as they are there; in the end, of all.

        A verification that passes the deadline is a "timeout"; one that raises, returns no finite reward or
        ends its process is an "error". Both have reward 0 and say in `detail` what happened.

        Raises:
            EngineError: a worker could not be started, or the pool is closed.
        """
        size = max(1, min(PIPELINE_ITEMS, -(-len(items) // len(self._workers))))
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        tells = [partial(_tell_from, tell, start) if tell else None for start in range(0, len(items), size)]
        verdicts = await asyncio.gather(*map(self._verify_part, parts, tells))
        return [verdict for part in verdicts for verdict in part]

    async def _verify_part(self, items: Sequence[Item], tell: TellPart | None = None) -> list[Verdict]:
        def told(before: int, verdicts: Sequence[Verdict]) -> None:
            self.verdicts += len(verdicts)
            if tell:
                tell(before, verdicts)

        worker = await self._free.get()
        try:
            return await worker.verify(items, told)
        finally:
            self._free.put_nowait(worker)

    async def close(self) -> None:
        """Kill all workers and wait until they are gone. A verification under way raises EngineError."""
        await asyncio.gather(*(worker.close() for worker in self._workers))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    """A running worker process. last_words: ends with the tail of its stderr once that is closed; folder: its own."""

    process: Process
    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    last_words: asyncio.Task[bytes]
    folder: str

    def write(self, *messages: Any) -> None:
        # No drain: a worker that reads nothing must meet the deadline, and PIPELINE_ITEMS bounds the memory.
        self.stdin.write(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

    async def read(self, timeout_s: float) -> bytes | None:
        """What the worker has written: b"" where it ended, None where it is silent past the deadline."""
        for patience in (timeout_s, LAST_LOOK_S):
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    return await self.stdout.read(_READ_BYTES)
        return None

    async def bury(self, patience_s: float = 0.0) -> str:
        """End the process, unless it ends within patience_s by itself, and all that it started.

        Returns:
            Its exit status and the last lines of its stderr.
        """
        await self._wait(patience_s)
        self._send(os.kill, signal.SIGTERM)  # the guard, which knows what there is to kill
        await self._wait(GUARD_PATIENCE_S)
        self._send(os.killpg, signal.SIGKILL)
        await self._wait(KILL_PATIENCE_S)
        # Who got away from a killed guard may hold the other end open for ever.
        await asyncio.wait([self.last_words], timeout=LAST_WORDS_S)
        self.last_words.cancel()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        heard = self.last_words.done() and not self.last_words.cancelled()
        words = self.last_words.result().decode(errors="replace").strip().splitlines()[-3:] if heard else []
        return "; ".join([f"exit status {self.process.returncode}", *map(str.strip, words)])

    async def _wait(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.process.wait()

    def _send(self, kill: Callable[[int, int], None], number: signal.Signals) -> None:
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                kill(self.process.pid, number)


class _Worker:
    """One verifier process, replaced whenever it had to be killed."""

    def __init__(self, hello: dict[str, Any], timeout_s: float) -> None:
        self._hello = hello
        self._timeout_s = timeout_s
        self._child: _Child | None = None
        self._ready = False
        self._closed = False
        self._asked = 0  # items so far, of all its processes

    async def verify(self, items: Sequence[Item], tell: TellPart | None) -> list[Verdict]:
        verdicts: list[Verdict] = []
        try:
            while True:
                child = await self._running_child()
                before = len(verdicts)
                async for found in self._run(child, items[before:]):
                    self._check_open()  # a killed process is no verdict
                    if tell:
                        tell(len(verdicts), found)
                    verdicts += found
                self._check_open()
                if len(verdicts) == len(items):
                    return verdicts
        except BaseException:
            await self._stop()  # the answers under way belong to nobody
            raise

    async def _run(self, child: _Child, items: Sequence[Item]) -> AsyncIterator[list[Verdict]]:
        """Verdicts of the first items as they come: of all, or up to and with the one that cost the process."""
        count = 0
        numbers = range(self._asked, self._asked + len(items))
        self._asked = numbers.stop
        child.write(*((number, *item) for number, item in zip(numbers, items, strict=True)))
        rest = b""
        while count < len(items):
            # The worker answers in order, so the deadline of an item runs from the answer before it.
            data = await child.read(self._timeout_s)
            if data is None:
                await child.bury()
                yield [_failed("timeout", f"no verdict after rewards.timeout_s = {self._timeout_s:g} s")]
                return
            if not data:
                detail = await child.bury(EXIT_PATIENCE_S)
                yield [_failed("error", f"the verifier process ended: {detail}")]
                return
            *lines, rest = (rest + data).split(b"\n")
            found = _decode(lines)
            if count + len(found) > len(items):  # which of them are true is not known
                found, lines = [], [b""]
            verdicts: list[Verdict] = []
            for number, verdict in found:
                if number != numbers[count + len(verdicts)]:  # of another item, from whoever else writes there
                    break
                verdicts.append(verdict)
            if len(verdicts) < len(lines) or len(rest) > _READ_BYTES:
                await child.bury()
                # What was answered before it may have come in the same read.
                yield [*verdicts, _failed("error", "the verifier process wrote what is no verdict")][
                    : len(items) - count
                ]
                return
            count += len(verdicts)
            yield verdicts

    async def _running_child(self) -> _Child:
        """The child if it is alive and ready, else a new one."""
        self._check_open()
        if self._child is not None and self._ready and self._child.process.returncode is None:
            return self._child
        for again in (True, False):  # one that is killed is no broken verifier
            await self._stop()
            self._child = child = await _spawn()
            child.write(self._hello)
            self._ready = bool(await child.read(START_TIMEOUT_S))
            if self._ready:
                break
            detail = await child.bury(EXIT_PATIENCE_S)
            self._check_open()
            if not (again and child.process.returncode == -signal.SIGKILL):
                raise EngineError(f"a reward worker did not start: {detail}")
        return child

    async def close(self) -> None:
        self._closed = True
        await self._stop()

    async def _stop(self) -> None:
        self._ready = False
        if self._child is not None:
            await self._child.bury()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the reward pool was closed; no further verification is possible")


async def _spawn() -> _Child:
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
    # They are None only for streams that are no PIPE.
    stdin, stdout = cast(asyncio.StreamWriter, process.stdin), cast(asyncio.StreamReader, process.stdout)
    last_words = asyncio.create_task(_tail(cast(asyncio.StreamReader, process.stderr)))
    return _Child(process=process, stdin=stdin, stdout=stdout, last_words=last_words, folder=folder)


async def _tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while data := await stream.read(_READ_BYTES):
        tail = (tail + data)[-_STDERR_BYTES:]
    return tail


def _environment(folder: str) -> dict[str, str]:
    """Little enough that no credential reaches a verifier, neither in a variable nor in a file of the home folder.

    Our packages are found wherever they lie.
    """
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    found = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    paths = [Path(__file__).resolve().parent.parent, *map(Path, found)]
    kept |= {"HOME": folder, "TMPDIR": folder, "PYTHONUSERBASE": site.getuserbase()}
    # One thread: numpy's pools would only eat the address space.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return kept | threads | {"PYTHONPATH": os.pathsep.join(str(path.absolute()) for path in paths)}


def _tell_from(tell: Tell, start: int, before: int, verdicts: Sequence[Verdict]) -> None:
    """Tell of verdicts of a part that begins with item `start`, after its first `before`."""
    tell(list(enumerate(verdicts, start=start + before)))


def _decode(lines: Sequence[bytes]) -> list[tuple[Any, Verdict]]:
    """The verdicts of some lines up to the first that is none, as a verifier may write anywhere.

    Returns:
        With each what stands in place of the number of its item.
    """
    found: list[tuple[Any, Verdict]] = []
    for line in lines:
        try:
            number, outcome, reward, answered, detail = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            return found
        good = outcome in get_args(Outcome) and type(answered) is bool and type(detail) is str
        if not (good and type(reward) is float and math.isfinite(reward)):
            return found
        found.append((number, Verdict(outcome=outcome, reward=reward, answered=answered, detail=detail)))
    return found


def _failed(outcome: Literal["error", "timeout"], detail: str) -> Verdict:
    return Verdict(outcome=outcome, reward=0.0, answered=False, detail=detail)
