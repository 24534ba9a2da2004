"""Actors and learner ranks behind Ray handles. Every call has a deadline and names who failed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from rlsys.config.engine_roles import trees_ahead
from rlsys.config.schema import Config, StageName
from rlsys.config.stages import stage_settings
from rlsys.control.watchdog import WATCH_INTERVAL_S, Silence
from rlsys.errors import CheckpointError, EngineError, LearnerLostError, NonFiniteLossError, ProcessDiedError
from rlsys.ray_errors import translated
from rlsys.trees import Tree, TreeFailure
from rlsys.types import (
    Float32Array,
    Int32Array,
    Preference,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    TrainingBatch,
    TrajectoryGroup,
    WeightAck,
    WeightManifest,
)

log = logging.getLogger(__name__)
FIRST_CAUSE_S = 3.0  # after which a death that broke other ranks is known
# Of these the learner is as it was before, if all ranks say so.
SURVIVED = (NonFiniteLossError, CheckpointError)


async def answer(reference: ray.ObjectRef, timeout_s: float, who: str, field: str) -> Any:
    """The value of a remote call.

    Args:
        field: the config field that holds the deadline.
    Raises:
        RlsysError: the remote error itself where it is one of ours; else EngineError naming `who`.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_s)
    except RayError as error:
        found = translated(error, who)
        raise found from None if isinstance(error, RayTaskError) and found is error.cause else error
    except (TimeoutError, asyncio.CancelledError) as ended:  # ours: a remote TimeoutError is a RayError as well
        if isinstance(reference, ray.ObjectRef):  # nobody waits for it any more
            ray.cancel(reference)
        if isinstance(ended, asyncio.CancelledError):
            raise
        raise EngineError(f"{who} did not answer within {field} = {timeout_s} s") from None


class RayActor:
    """ActorHandle of a Ray actor with an engine.

    Args:
        who: the actor in error messages.
    """

    def __init__(self, handle: Any, config: Config, who: str) -> None:
        self.handle = handle
        self._config = config
        self._who = who
        self._turns = asyncio.Semaphore(trees_ahead(config))
        self._process: psutil.Process | None = None

    async def start(self) -> None:
        place = await self._call("start", self._config.actors.start_timeout_s, "actors.start_timeout_s")
        self._process = process_at(*place)

    async def generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        found: Sequence[TrajectoryGroup | RolloutFailure] = await self._rollout("generate", list(prompts), settings)
        return found

    async def search(self, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        async with self._turns:  # a deadline should not run while a tree only waits for others
            found: TrajectoryGroup | RolloutFailure = await self._rollout("search", prompt)
            return found

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure:
        tree: Tree | TreeFailure = await self._rollout("grow", prompt)
        return tree

    async def usage(self) -> Any:
        return await self._rollout("usage")

    async def progress(self) -> int:
        found: int = await self._rollout("progress")
        return found

    async def probe(self, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        found: Sequence[Float32Array] = await self._update("probe", list(rows))
        return found

    async def update_weights(
        self, manifest: WeightManifest, references: Sequence[Any], probe: Sequence[Int32Array]
    ) -> WeightAck:
        found: WeightAck = await self._update("update_weights", manifest, list(references), list(probe))
        return found

    async def close(self) -> None:
        """Close the engine and the verifiers, then end the process.

        Ray must end it. A process that ends by itself may crash in a library's exit handler, which Ray reports.
        """
        await self._call("close", 5.0, "the shutdown")
        ray.kill(self.handle)

    def kill(self) -> None:
        kill(self.handle, self._process)

    async def _rollout(self, method: str, *arguments: Any) -> Any:
        return await self._call(method, self._config.actors.rollout_timeout_s, "actors.rollout_timeout_s", *arguments)

    async def _update(self, method: str, *arguments: Any) -> Any:
        return await self._call(method, self._config.weight_sync.timeout_s, "weight_sync.timeout_s", *arguments)

    async def _call(self, method: str, timeout_s: float, field: str, *arguments: Any) -> Any:
        return await answer(getattr(self.handle, method).remote(*arguments), timeout_s, self._who, field)


class RayLearner:
    """Learner over one Ray actor per DeepSpeed rank. A failure on one rank is the failure of all.

    Args:
        spawn: starts the processes of all ranks, by attempt, from 0.
    """

    def __init__(self, spawn: Callable[[int], Sequence[Any]], config: Config) -> None:
        self._spawn = spawn
        self._config = config
        self.restarts = 0
        self._handles = spawn(0)
        self._processes: list[psutil.Process | None] = [None] * len(self._handles)

    async def restart(self) -> None:
        """Kill all ranks and start new ones, which know nothing."""
        for rank, (handle, process) in enumerate(zip(self._handles, self._processes, strict=True)):
            try:
                kill(handle, process)
            except Exception:  # the other ranks are to end too
                log.exception("learner rank %d could not be ended", rank)
        self.restarts += 1
        self._handles = self._spawn(self.restarts)
        self._processes = [None] * len(self._handles)

    def close(self) -> None:
        """End all ranks. No call may be under way."""
        for handle in self._handles:
            ray.kill(handle)

    async def _find_processes(self) -> None:
        """A rank that is stopped later cannot be asked for its process any more."""
        places = await self._answers("place")
        self._processes = [process_at(*place) for place in places]

    async def start_stage(self, stage: StageName, policy: Path, resume: Path | None, reference: Path | None) -> None:
        await self._find_processes()
        await self._all("start_stage", stage_settings(self._config, stage), policy, resume, reference)

    async def train(self, batch: TrainingBatch, step: int, version: int) -> Mapping[str, float]:
        shared = await asyncio.to_thread(ray.put, batch)  # one copy for all ranks; an object store may take its time
        figures: Mapping[str, float] = (await self._all("train", shared, step, version, moving=True))[0]
        return figures

    async def score_pairs(self, pairs: Sequence[Preference]) -> Sequence[tuple[float, float]]:
        shared = await asyncio.to_thread(ray.put, list(pairs))
        found: list[tuple[float, float]] = (await self._all("score_pairs", shared))[0]
        return found

    async def export(
        self, version: int, probe: Sequence[Int32Array]
    ) -> tuple[WeightManifest, Sequence[Any], Sequence[Float32Array]]:
        bucket_bytes = int(self._config.weight_sync.bucket_mib * 2**20)
        found: tuple[WeightManifest, Sequence[Any], Sequence[Float32Array]]
        found = (await self._all("export", version, bucket_bytes, list(probe)))[0]
        return found

    async def save(self, folder: Path) -> None:
        await self._all("save", folder)

    async def _all(self, method: str, *arguments: Any, moving: bool = False) -> list[Any]:
        """The answers of all ranks to a call of all, which are watched meanwhile.

        Args:
            moving: whether their progress must grow; else it is enough that they tell it.
        Raises:
            LearnerLostError: a rank died, broke or hangs, or not all of them have the same error.
            RlsysError: the error of all.
        """
        work = asyncio.create_task(self._answers(method, *arguments))
        watch = asyncio.create_task(self._watch(moving))
        try:
            await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await watch
            return await work
        finally:
            for task in (watch, work):
                task.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)

    async def _answers(self, method: str, *arguments: Any) -> list[Any]:
        references = [getattr(handle, method).remote(*arguments) for handle in self._handles]
        timeout = self._config.learner.timeout_s
        calls = [
            asyncio.create_task(answer(reference, timeout, f"learner rank {rank}", "learner.timeout_s"))
            for rank, reference in enumerate(references)
        ]
        try:
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            if all(call.done() and not call.exception() for call in calls):
                return [call.result() for call in calls]
            raise await self._error_of(calls)
        finally:
            for call in calls:
                call.cancel()

    async def _error_of(self, calls: Sequence[asyncio.Task[Any]]) -> BaseException:
        """What to say where a rank has failed."""
        first = next(error for call in calls if call.done() and (error := call.exception()))
        # Where all survive, all say so, one after the other; where a rank dies the others fail too, and may be heard
        # of first: of what is known soon, the death counts.
        survived = isinstance(first, SURVIVED)
        await asyncio.wait(calls, timeout=self._config.learner.hang_timeout_s if survived else FIRST_CAUSE_S)
        errors = [error for call in calls if call.done() and (error := call.exception())]
        if survived and all(isinstance(error, type(first)) for error in errors) and len(errors) == len(calls):
            return first
        error = min(errors, key=lambda each: (not isinstance(each, ProcessDiedError), isinstance(each, SURVIVED)))
        if isinstance(error, EngineError):
            return LearnerLostError(error.message)
        return LearnerLostError(f"not all ranks have met what one has: {error}") if survived else error

    async def _watch(self, moving: bool) -> None:
        """Ends with an error where a rank is silent for learner.hang_timeout_s."""
        limit = self._config.learner.hang_timeout_s
        silences = [Silence() for _ in self._handles]
        asked: dict[int, asyncio.Task[None]] = {}

        async def ask(rank: int) -> None:
            with contextlib.suppress(EngineError):  # a death is the other call's to tell
                found = await answer(self._handles[rank].progress.remote(), limit / 4, f"learner rank {rank}", "")
                silences[rank].heard(found, idle=not moving)

        try:
            while True:
                for rank in range(len(silences)):
                    if rank not in asked or asked[rank].done():
                        asked[rank] = asyncio.create_task(ask(rank))
                await asyncio.sleep(WATCH_INTERVAL_S)
                silent = [silence.look() for silence in silences]
                if max(silent) > limit:
                    # Ranks that wait for a stopped one make no progress either, but they answer.
                    rank = max(range(len(silent)), key=lambda each: (not asked[each].done(), silent[each]))
                    what = f"learner rank {rank} made no progress within learner.hang_timeout_s = {limit} s"
                    raise LearnerLostError(what)
        finally:
            for task in asked.values():
                task.cancel()


def process_at(host: str, pid: int) -> psutil.Process | None:
    """A process of this host; None of another one, or where it is gone."""
    if host == socket.gethostname():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(pid)
            # Containers may share a name and not their process ids.
            return process if any("ray::" in part for part in process.cmdline()) else None
    return None


def kill(handle: Any, process: psutil.Process | None) -> None:
    """End a Ray actor at once. Ray asks its process to end, and a stopped one hears nothing."""
    try:
        ray.kill(handle)
    finally:
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
