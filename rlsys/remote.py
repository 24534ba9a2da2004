"""Actors and learner ranks behind Ray handles. Every call has a deadline and names who failed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from rlsys.config import Config, StageName
from rlsys.errors import EngineError
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
    except TimeoutError:  # ours: a remote TimeoutError is a RayError as well
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
        host, pid = await self._call("start", self._config.actors.start_timeout_s, "actors.start_timeout_s")
        if host == socket.gethostname():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(pid)

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
        ray.kill(self.handle)
        if self._process is not None:  # Ray asks the process to end, and a stopped one hears nothing
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.kill()

    async def _rollout(self, method: str, *arguments: Any) -> Any:
        return await self._call(method, self._config.actors.rollout_timeout_s, "actors.rollout_timeout_s", *arguments)

    async def _update(self, method: str, *arguments: Any) -> Any:
        return await self._call(method, self._config.weight_sync.timeout_s, "weight_sync.timeout_s", *arguments)

    async def _call(self, method: str, timeout_s: float, field: str, *arguments: Any) -> Any:
        return await answer(getattr(self.handle, method).remote(*arguments), timeout_s, self._who, field)


class RayLearner:
    """Learner over one Ray actor per DeepSpeed rank. A failure on one rank is the failure of all."""

    def __init__(self, handles: Sequence[Any], config: Config) -> None:
        self._handles = handles
        self._config = config

    async def start_stage(self, stage: StageName, policy: Path, resume: Path | None, reference: Path | None) -> None:
        await self._all("start_stage", stage_settings(self._config, stage), policy, resume, reference)

    async def train(self, batch: TrainingBatch, step: int, version: int) -> Mapping[str, float]:
        shared = ray.put(batch)  # one copy for all ranks
        return (await self._all("train", shared, step, version))[0]

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
            answer(reference, timeout, f"learner rank {rank}", "learner.timeout_s")
            for rank, reference in enumerate(references)
        ]
        return list(await asyncio.gather(*calls))
