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
from actors.verifiers.process import VerifierProcess
from actors.verifiers.wire import Answer, answered, problem_values, request, turns_request
from rlsys.config.environment import EnvironmentConfig
from rlsys.config.rewards import RewardsConfig
from rlsys.config.search_values import FunctionValueConfig
from rlsys.config.tasks import TaskConfig
from rlsys.errors import ConfigError, EngineError
from rlsys.interfaces import Reply
from rlsys.types import Problem, Verdict

Item = tuple[Problem, str] | tuple[Problem, str, bool] | tuple[Mapping[str, Any]]
"""Arguments of `Task.verify`: problem, completion and, if given, whether the completion is finished. A mapping
has those of `Task.check_steps` by name, problem and chain for a value, or problem and turns for the environment."""

OnVerdicts = Callable[[Sequence[tuple[int, Verdict]]], None]
OnAnswers = Callable[[int, Sequence[Answer]], None]  # gets the number of earlier answers and the new answers

MAX_LINE_BYTES = 1 << 20  # MAX_REPLY_CHARS of a reply in JSON fit
FOREIGN = "the verifier process wrote something other than a verdict"
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
        folder: Folder in which the command was started, where code of the user is looked up.
        value: Function that gives values to chains; None without one.
        environment: Section of the environment in use; None without an environment.
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
        environment: EnvironmentConfig | None = None,
        verifier: str | None = None,
    ) -> None:
        hello: dict[str, Any] = {"parent": os.getpid(), "memory_mib": config.memory_mib, "seed": seed}
        hello |= {"rewards": config.model_dump(mode="json"), "folder": folder}
        hello["value"] = value.model_dump(mode="json") if value else None
        hello["environment"] = environment.model_dump(mode="json") if environment else None
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
            ConfigError: A function of the user, or the task, cannot be used.
        """
        await asyncio.gather(*(self._ask(()) for _ in self._workers))

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
        return list(map(_verdict, await self._answers(items, on_verdicts)))

    async def replies(self, items: Sequence[tuple[Problem, Sequence[str]]]) -> list[Reply | Verdict]:
        """Ask the environment for its replies to problems and turns; limits are those of `verify`.

        Returns:
            In the order of `items`, a reply, or a verdict with the outcome "timeout" or "error" in its place.
        """
        answers = await self._answers([(turns_request(*item),) for item in items])
        is_reply = (isinstance(each, Reply) or each.outcome in ("error", "timeout") for each in answers)
        return [each if known else _failed("error", FOREIGN) for each, known in zip(answers, is_reply, strict=True)]

    async def _answers(self, items: Sequence[Item], on_verdicts: OnVerdicts | None = None) -> list[Answer]:
        size = max(1, min(PIPELINE_ITEMS, -(-len(items) // len(self._workers))))
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        callbacks = [
            partial(_report_part, on_verdicts, start) if on_verdicts else None for start in range(0, len(items), size)
        ]
        answers = await asyncio.gather(*map(self._ask, parts, callbacks))
        return [answer for part in answers for answer in part]

    async def check_steps(self, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Check the steps of chains, each with its question, as `verify` does; see `actors.verifiers.steps`."""
        return await self.verify([({"question": question, "completion": chain},) for question, chain in items])

    async def values(self, problem: Problem, chains: Sequence[str]) -> list[Verdict]:
        """Return the values of chains as rewards, judged as by `verify`.

        A chain without a value has no answer.
        """
        return await self.verify([({"problem": problem_values(problem), "chain": chain},) for chain in chains])

    async def _ask(self, items: Sequence[Item], on_answers: OnAnswers | None = None) -> list[Answer]:
        def count_and_report(earlier: int, answers: Sequence[Answer]) -> None:
            self.verdicts += len(answers)
            if on_answers:
                on_answers(earlier, answers)

        worker = await self._free.get()
        try:
            return await worker.ask(items, count_and_report)
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

    async def ask(self, items: Sequence[Item], on_answers: OnAnswers) -> list[Answer]:
        answers: list[Answer] = []
        try:
            while True:
                process = await self._running_process()
                async for new in self._run(process, items[len(answers) :]):
                    self._check_open()  # a process killed by `close` gives no verdict
                    on_answers(len(answers), new)
                    answers += new
                self._check_open()
                if len(answers) == len(items):
                    return answers
        except BaseException:
            await self._stop()  # the remaining answers must not reach the next caller
            raise

    async def _run(self, process: VerifierProcess, items: Sequence[Item]) -> AsyncIterator[list[Answer]]:
        """Yield answers as they arrive, up to the last item or the item that ended the process."""
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
            answers = _answers_of(lines, numbers)
            if len(answers) < len(lines) or len(unread) > MAX_LINE_BYTES:
                await process.end()
                yield [*answers, _failed("error", FOREIGN)][: len(numbers)]
                return
            numbers = numbers[len(answers) :]
            yield answers

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
                if process.exit_status == os.EX_CONFIG:
                    raise ConfigError(detail.partition("; ")[2])
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


def _report_part(on_verdicts: OnVerdicts, start: int, earlier: int, answers: Sequence[Answer]) -> None:
    """Report new verdicts of a part that begins with item `start` and has `earlier` verdicts already."""
    on_verdicts(list(enumerate(map(_verdict, answers), start=start + earlier)))


def _verdict(answer: Answer) -> Verdict:
    """Return an answer that is a verdict, and an error for a reply, which a verifier wrote in its place."""
    return _failed("error", FOREIGN) if isinstance(answer, Reply) else answer


def _answers_of(lines: Sequence[bytes], numbers: Sequence[int]) -> list[Answer]:
    """Return the answers of lines to the items `numbers` in order, up to the first line that is none.

    Return no answer if there are more answers than items: it is unknown which of them are genuine.
    """
    numbered = _decode(lines)
    if len(numbered) > len(numbers):
        return []
    answers: list[Answer] = []
    for expected, (number, answer) in zip(numbers, numbered, strict=False):
        if number != expected:  # another program wrote the line, or it answers another item
            break
        answers.append(answer)
    return answers


def _decode(lines: Sequence[bytes]) -> list[tuple[Any, Answer]]:
    """Return item number and answer of each line, up to the first line that has none.

    A verifier may write anything into the pipe; even the numbers may be of any type.
    """
    answers: list[tuple[Any, Answer]] = []
    for line in lines:
        answer = answered(line)
        if answer is None:
            break
        answers.append(answer)
    return answers


def _failed(outcome: Literal["error", "timeout"], detail: str) -> Verdict:
    return Verdict(outcome=outcome, reward=0.0, answered=False, detail=detail)
