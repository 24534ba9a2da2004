"""A pool of verifier processes with a deadline for every verification.

Any number of callers may submit items at the same time; each call waits for free processes. A
verification that hangs, crashes or takes too much memory loses only its own verdict and one process.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from actors.verifiers import process as processes
from actors.verifiers.process import READ_BYTES, VerifierProcess
from actors.verifiers.wire import answered, problem_values, request
from rlsys.config.rewards import RewardsConfig
from rlsys.config.search_values import FunctionValueConfig
from rlsys.config.tasks import TaskConfig
from rlsys.errors import EngineError
from rlsys.types import Problem, Verdict

Item = tuple[Problem, str] | tuple[Problem, str, bool] | tuple[Mapping[str, Any]]
"""Arguments of `Task.verify`: problem, completion and, if given, whether the completion is finished. A mapping
has those of `Task.check_steps` by name, or problem and chain for a value."""

OnVerdicts = Callable[[Sequence[tuple[int, Verdict]]], None]
OnPartVerdicts = Callable[[int, Sequence[Verdict]], None]  # gets the number of earlier verdicts and the new verdicts

START_TIMEOUT_S = 60.0
# Items written to a process at once: enough to hide the round trip, few enough to spread over all processes.
PIPELINE_ITEMS = 32
# A process that closed its pipe is about to end by itself, with an exit status that says why.
EXIT_PATIENCE_S = 2.0


class RewardPool:
    """`config.workers` verifier processes, started on first use. All calls must come from one event loop.

    The processes die with the thread that runs the event loop: Linux ties the death signal to it.

    Args:
        task_config: Task whose `verify` judges completions.
        seed: run.seed.
        config: Number of workers, and deadline and memory of one verification.
        folder: Folder in which the command was started, where reward functions are looked up.
        value: Function that gives values to chains; None without one.
        verifier: "module:factory" to use in place of the task's verifier, for tests.

    Attributes:
        verdicts: Number of verdicts so far.
    """

    def __init__(
        self,
        task_config: TaskConfig,
        seed: int,
        config: RewardsConfig,
        *,
        folder: str = "",
        value: FunctionValueConfig | None = None,
        verifier: str | None = None,
    ) -> None:
        hello: dict[str, Any] = {"parent": os.getpid(), "memory_mib": config.memory_mib, "seed": seed}
        hello |= {"rewards": config.model_dump(mode="json"), "folder": folder}
        hello["value"] = value.model_dump(mode="json") if value else None
        hello |= {"verifier": verifier} if verifier else {"task": task_config.model_dump(mode="json")}
        self._workers = [_Worker(hello, config.timeout_s) for _ in range(config.workers)]
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()
        self.verdicts = 0
        for worker in self._workers:
            self._free.put_nowait(worker)

    async def start(self) -> None:
        """Start all workers, so that a broken verifier shows before the first rollout.

        Raises:
            EngineError: A worker did not start. The message has the last lines of its stderr.
        """
        await asyncio.gather(*(self._verify_part(()) for _ in self._workers))

    async def verify(self, items: Sequence[Item], on_verdicts: OnVerdicts | None = None) -> list[Verdict]:
        """Judge items, each with a problem, a completion and whether it is finished (by default it is).

        A verification that passes the deadline has the outcome "timeout". One that raises, returns a reward that is
        not finite, or ends its process has the outcome "error". Both have reward 0 and a reason in `detail`.

        Args:
            on_verdicts: Called as verdicts arrive, with the index and the verdict of every new item.

        Returns:
            The verdicts in the order of `items`.

        Raises:
            EngineError: A worker could not be started, or the pool is closed.
        """
        size = max(1, min(PIPELINE_ITEMS, -(-len(items) // len(self._workers))))
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        callbacks = [
            partial(_report_part, on_verdicts, start) if on_verdicts else None for start in range(0, len(items), size)
        ]
        verdicts = await asyncio.gather(*map(self._verify_part, parts, callbacks))
        return [verdict for part in verdicts for verdict in part]

    async def check_steps(self, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Check the steps of chains, each with its question, as `verify` does; see `actors.verifiers.steps`."""
        return await self.verify([({"question": question, "completion": chain},) for question, chain in items])

    async def values(self, problem: Problem, chains: Sequence[str]) -> list[Verdict]:
        """Return the values of chains as rewards, judged as by `verify`.

        A chain without a value has no answer.
        """
        return await self.verify([({"problem": problem_values(problem), "chain": chain},) for chain in chains])

    async def _verify_part(self, items: Sequence[Item], on_verdicts: OnPartVerdicts | None = None) -> list[Verdict]:
        def count_and_report(earlier: int, verdicts: Sequence[Verdict]) -> None:
            self.verdicts += len(verdicts)
            if on_verdicts:
                on_verdicts(earlier, verdicts)

        worker = await self._free.get()
        try:
            return await worker.verify(items, count_and_report)
        finally:
            self._free.put_nowait(worker)

    async def close(self) -> None:
        """Kill all workers and wait until they are gone. A running verification raises EngineError."""
        await asyncio.gather(*(worker.close() for worker in self._workers))


class _Worker:
    """One place in the pool: a verifier process, and a new process after each one that had to be killed."""

    def __init__(self, hello: dict[str, Any], timeout_s: float) -> None:
        self._hello = hello
        self._timeout_s = timeout_s
        self._process: VerifierProcess | None = None
        self._ready = False
        self._closed = False
        self._items_sent = 0  # to all its processes

    async def verify(self, items: Sequence[Item], on_verdicts: OnPartVerdicts) -> list[Verdict]:
        verdicts: list[Verdict] = []
        try:
            while True:
                process = await self._running_process()
                async for new in self._run(process, items[len(verdicts) :]):
                    self._check_open()  # a process killed by `close` gives no verdict
                    on_verdicts(len(verdicts), new)
                    verdicts += new
                self._check_open()
                if len(verdicts) == len(items):
                    return verdicts
        except BaseException:
            await self._stop()  # the remaining answers must not reach the next caller
            raise

    async def _run(self, process: VerifierProcess, items: Sequence[Item]) -> AsyncIterator[list[Verdict]]:
        """Yield verdicts as they arrive, up to the last item or the item that ended the process."""
        numbers = range(self._items_sent, self._items_sent + len(items))
        self._items_sent = numbers.stop
        process.write(*(request(number, *item) for number, item in zip(numbers, items, strict=True)))
        unread = b""
        while numbers:
            # The process answers in order, so the deadline of an item runs from the answer before it.
            data = await process.read(self._timeout_s)
            if data is None:
                await process.end()
                yield [_failed("timeout", f"no verdict after rewards.timeout_s = {self._timeout_s:g} s")]
                return
            if not data:
                detail = await process.end(EXIT_PATIENCE_S)
                yield [_failed("error", f"the verifier process ended: {detail}")]
                return
            *lines, unread = (unread + data).split(b"\n")
            verdicts = _verdicts_of(lines, numbers)
            if len(verdicts) < len(lines) or len(unread) > READ_BYTES:
                await process.end()
                failure = _failed("error", "the verifier process wrote something other than a verdict")
                yield [*verdicts, failure][: len(numbers)]
                return
            numbers = numbers[len(verdicts) :]
            yield verdicts

    async def _running_process(self) -> VerifierProcess:
        """Return the present process if it is alive and ready, otherwise a new one."""
        self._check_open()
        if self._process is not None and self._ready and self._process.exit_status is None:
            return self._process
        for is_first_try in (True, False):  # a SIGKILL during the start is no proof of a broken verifier
            await self._stop()
            self._process = process = await processes.spawn()
            process.write(self._hello)
            self._ready = bool(await process.read(START_TIMEOUT_S))
            if self._ready:
                break
            detail = await process.end(EXIT_PATIENCE_S)
            self._check_open()
            if not (is_first_try and process.exit_status == -signal.SIGKILL):
                raise EngineError(f"a reward worker did not start: {detail}")
        return process

    async def close(self) -> None:
        self._closed = True
        await self._stop()

    async def _stop(self) -> None:
        self._ready = False
        if self._process is not None:
            await self._process.end()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the reward pool was closed; no further verification is possible")


def _report_part(on_verdicts: OnVerdicts, start: int, earlier: int, verdicts: Sequence[Verdict]) -> None:
    """Report new verdicts of a part that begins with item `start` and has `earlier` verdicts already."""
    on_verdicts(list(enumerate(verdicts, start=start + earlier)))


def _verdicts_of(lines: Sequence[bytes], numbers: Sequence[int]) -> list[Verdict]:
    """Return the verdicts of lines that answer the items `numbers` in order, up to the first line that does not.

    Return no verdict if there are more verdicts than items: it is unknown which of them are genuine.
    """
    numbered = _decode(lines)
    if len(numbered) > len(numbers):
        return []
    verdicts: list[Verdict] = []
    for expected, (number, verdict) in zip(numbers, numbered, strict=False):
        if number != expected:  # another program wrote the line, or it answers another item
            break
        verdicts.append(verdict)
    return verdicts


def _decode(lines: Sequence[bytes]) -> list[tuple[Any, Verdict]]:
    """Return item number and verdict of each line, up to the first line that is not a verdict.

    A verifier may write anything into the pipe; even the numbers may be of any type.
    """
    verdicts: list[tuple[Any, Verdict]] = []
    for line in lines:
        answer = answered(line)
        if answer is None:
            break
        verdicts.append(answer)
    return verdicts


def _failed(outcome: Literal["error", "timeout"], detail: str) -> Verdict:
    return Verdict(outcome=outcome, reward=0.0, answered=False, detail=detail)
