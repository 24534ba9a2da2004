"""Actors and learner ranks behind Ray handles. Every call has a deadline and names who failed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from rlsys.config import Config, StageName
from rlsys.errors import EngineError, LearnerLostError
from rlsys.fleet import WATCH_INTERVAL_S
from rlsys.ray_errors import translated
from rlsys.search_engines import trees_ahead
from rlsys.stage_settings import stage_settings
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

FIRST_CAUSE_S = 3.0  # after which a death that broke other ranks is known


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
        await self._call("close", 5.0, "the shutdown")

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

    async def restart(self) -> None:
        """Kill all ranks and start new ones, which know nothing."""
        places = [handle.place.remote() for handle in self._handles]
        found = await asyncio.gather(
            *(answer(place, 5.0, "a learner rank", "the search for it") for place in places), return_exceptions=True
        )
        for handle, place in zip(self._handles, found, strict=True):
            kill(handle, None if isinstance(place, BaseException) else process_at(*place))
        self.restarts += 1
        self._handles = self._spawn(self.restarts)

    async def start_stage(self, stage: StageName, policy: Path, resume: Path | None, reference: Path | None) -> None:
        await self._all("start_stage", stage_settings(self._config, stage), policy, resume, reference)

    async def train(self, batch: TrainingBatch, step: int, version: int) -> Mapping[str, float]:
        shared = ray.put(batch)  # one copy for all ranks
        watch = asyncio.create_task(self._watch())
        work = asyncio.create_task(self._all("train", shared, step, version))
        try:
            await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                await watch
            return (await work)[0]
        finally:
            for task in (watch, work):
                task.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)

    async def score_pairs(self, pairs: Sequence[Preference]) -> Sequence[tuple[float, float]]:
        found: list[tuple[float, float]] = (await self._all("score_pairs", ray.put(list(pairs))))[0]
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

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
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
            # Where a rank dies the others fail too, and may be heard of first: of what is known soon, the death counts.
            await asyncio.wait(calls, timeout=FIRST_CAUSE_S)
            errors = [error for call in calls if call.done() and (error := call.exception())]
            error = min(errors, key=lambda each: not isinstance(each, EngineError) or " died: " not in str(each))
            raise LearnerLostError(error.message) if isinstance(error, EngineError) else error
        finally:
            for call in calls:
                call.cancel()

    async def _watch(self) -> None:
        """Ends with an error where a rank shows no progress for learner.hang_timeout_s."""
        limit = self._config.learner.hang_timeout_s
        seen = [-1] * len(self._handles)
        since = [time.monotonic()] * len(self._handles)

        async def look(rank: int) -> None:
            with contextlib.suppress(EngineError):  # a death is the other call's to tell
                found = await answer(self._handles[rank].progress.remote(), limit, f"learner rank {rank}", "")
                if found != seen[rank]:
                    seen[rank], since[rank] = found, time.monotonic()

        while True:
            await asyncio.wait([asyncio.create_task(look(rank)) for rank in range(len(seen))], timeout=limit)
            stuck = [rank for rank, last in enumerate(since) if time.monotonic() - last > limit]
            if stuck:
                raise LearnerLostError(
                    f"learner rank {stuck[0]} made no progress within learner.hang_timeout_s = {limit} s"
                )
            await asyncio.sleep(WATCH_INTERVAL_S)


def process_at(host: str, pid: int) -> psutil.Process | None:
    """A process of this host; None of another one, or where it is gone."""
    if host == socket.gethostname():
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(pid)
    return None


def kill(handle: Any, process: psutil.Process | None) -> None:
    """End a Ray actor at once. Ray asks its process to end, and a stopped one hears nothing."""
    ray.kill(handle)
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
