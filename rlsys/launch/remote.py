"""Adapters of Ray handles to actors and learner ranks. Every call has a deadline and names the process that failed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from rlsys.config.engine_roles import trees_ahead
from rlsys.config.schema import Config
from rlsys.config.stages import stage_plan
from rlsys.control.learner_group import LearnerGroup
from rlsys.control.watchdog import WatchClock
from rlsys.deadlines import within
from rlsys.errors import DataError, EngineError, RolloutError
from rlsys.interfaces import EngineStats, TokenValues
from rlsys.ray_errors import translated
from rlsys.trees import Tree, TreeFailure
from rlsys.types import (
    Float32Array,
    Int32Array,
    Preference,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    StageName,
    TrainingBatch,
    TrajectoryGroup,
)
from rlsys.weight_types import WeightAck, WeightManifest, WeightOffer

PLACE = "place"


async def answer(reference: ray.ObjectRef, timeout_s: float, who: str, field: str) -> Any:
    """Return the value of a remote call.

    Nothing cancels the call in Ray. A call that Ray drops before it is sent leaves a gap in the numbers of the calls to
    its process, and an ordered process waits for the missing one until Ray gives the process up.

    Args:
        timeout_s: seconds to wait; a pause of the driver does not count.
        who: the process in error messages.
        field: the config field that holds the deadline.
    Raises:
        RlsysError: the remote error itself if it is an RlsysError, otherwise an EngineError that names `who`.
    """
    try:
        return await within(asyncio.wrap_future(reference.future()), timeout_s)
    except RayError as error:
        ours = translated(error, who)
        raise ours from None if isinstance(error, RayTaskError) and ours is error.cause else error
    except TimeoutError:  # a local timeout: a remote TimeoutError is a RayError
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
        self._process = process_at(host, pid)

    async def generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        groups: Sequence[TrajectoryGroup | RolloutFailure] = await self._rollout("generate", list(prompts), settings)
        return groups

    async def search(self, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        async with self._turns:  # the deadline must not run while the tree only waits for others
            group: TrajectoryGroup | RolloutFailure = await self._rollout("search", prompt)
            return group

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure:
        tree: Tree | TreeFailure = await self._rollout("grow", prompt)
        return tree

    async def engine_stats(self) -> EngineStats:
        stats: EngineStats = await self._rollout("engine_stats")
        return stats

    async def progress(self) -> int:
        steps: int = await self._rollout("progress")
        return steps

    async def probe(self, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        logprobs: Sequence[Float32Array] = await self._update("probe", list(rows))
        return logprobs

    async def update_weights(self, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck:
        ack: WeightAck = await self._update("update_weights", offer, list(probe))
        return ack

    async def score(self, token_ids: Int32Array, tokens: int | None) -> tuple[Int32Array, Float32Array]:
        answered: Any = await self._rollout("score", token_ids.tolist(), tokens, "driver")
        if isinstance(answered, RolloutError):
            raise DataError(f"{self._who} refused a row of {len(token_ids)} tokens: {answered.message}")
        ids, logprobs = answered
        return ids, logprobs

    async def forget(self, caller: str) -> None:
        await self._rollout("forget", caller)

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
        reference = getattr(self.handle, method).remote(*arguments)
        try:
            return await answer(reference, timeout_s, self._who, field)
        except asyncio.CancelledError:
            ray.cancel(reference)  # such an actor takes calls out of order, and need not go on with this one
            raise


class RayRank:
    """RankHandle of a Ray actor that holds one DeepSpeed rank.

    Args:
        who: the rank in error messages.
    """

    def __init__(self, handle: Any, config: Config, who: str) -> None:
        self.handle = handle
        self.process: psutil.Process | None = None
        self._config = config
        self._who = who

    async def call(self, method: str, *arguments: Any) -> Any:
        reference = getattr(self.handle, method).remote(*arguments)
        field = "start_timeout_s" if method == PLACE else "timeout_s"  # the first call, which waits for the process
        return await answer(reference, getattr(self._config.learner, field), self._who, f"learner.{field}")

    async def progress(self, timeout_s: float) -> int:
        steps: int = await answer(self.handle.progress.remote(), timeout_s, self._who, "")
        return steps

    def kill(self) -> None:
        kill(self.handle, self.process)


class RayLearner:
    """Learner over one Ray actor per DeepSpeed rank.

    Args:
        spawn: starts the Ray actors of all ranks, by attempt, from 0.
        clock: the clock of the watch.
    """

    shares_device = False

    def __init__(self, spawn: Callable[[int], Sequence[Any]], config: Config, clock: WatchClock | None = None) -> None:
        self._spawn = spawn
        self._config = config
        self._ranks: list[RayRank] = []
        self._group = LearnerGroup(self._start_ranks, hang_timeout_s=config.learner.hang_timeout_s, clock=clock)

    @property
    def restarts(self) -> int:
        """Attempts before the present one, since the command began."""
        return self._group.restarts

    def _start_ranks(self, attempt: int) -> Sequence[RayRank]:
        handles = self._spawn(attempt)
        self._ranks = [RayRank(handle, self._config, f"learner rank {n}") for n, handle in enumerate(handles)]
        return self._ranks

    async def restart(self) -> None:
        """Kill all ranks and start new ones, which have no state."""
        self._group.restart()

    def activity(self) -> dict[str, Any]:
        """Return the name and the seconds of the call under way; nothing between two calls."""
        return self._group.activity()

    async def call(self, method: str, *arguments: Any, moving: bool = False) -> Sequence[Any]:
        """Return the answers of all ranks; see `LearnerGroup.call`."""
        return await self._group.call(method, *arguments, moving=moving)

    def close(self) -> None:
        """End all ranks. No call may be under way."""
        for rank in self._ranks:
            ray.kill(rank.handle)

    async def start_stage(self, stage: StageName, policy: Path, resume: Path | None, reference: Path | None) -> None:
        # The processes are looked up now: a rank that is stopped later cannot be asked.
        for rank, place in zip(self._ranks, await self._group.answers(PLACE), strict=True):
            rank.process = process_at(*place)
        await self.call("start_stage", stage_plan(self._config, stage).settings, policy, resume, reference)

    async def train(self, batch: TrainingBatch, step: int, version: int) -> Mapping[str, float]:
        # One copy for all ranks, in a thread because the object store may take its time.
        shared = await asyncio.to_thread(ray.put, batch)
        metrics: Mapping[str, float] = (await self.call("train", shared, step, version, moving=True))[0]
        return metrics

    async def token_values(self) -> Sequence[TokenValues]:
        by_rank: Sequence[Sequence[TokenValues | None]] = await self.call("token_values")
        return [next(filter(None, values)) for values in zip(*by_rank, strict=True)]

    async def score_pairs(self, pairs: Sequence[Preference]) -> Sequence[tuple[float, float]]:
        shared = await asyncio.to_thread(ray.put, list(pairs))
        scores: list[tuple[float, float]] = (await self.call("score_pairs", shared))[0]
        return scores

    async def score(self, probe: Sequence[Int32Array]) -> Sequence[Float32Array]:
        scores: Sequence[Float32Array] = (await self.call("score", list(probe)))[0]
        return scores

    def offer(self, version: int) -> WeightOffer:
        return WeightOffer(version=version, attempt=self.restarts, source=self._ranks[0].handle)

    async def send(self, version: int, members: Sequence[str]) -> WeightManifest:
        manifest: WeightManifest = (await self.call("send", version, tuple(members)))[0]
        return manifest

    async def save(self, folder: Path) -> None:
        await self.call("save", folder)


def process_at(host: str, pid: int) -> psutil.Process | None:
    """Return a process of this host, or None if the host is another one or the process is gone."""
    if host == socket.gethostname():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(pid)
            # Two containers may have the same host name and other process ids.
            return process if any("ray::" in part for part in process.cmdline()) else None
    return None


def kill(handle: Any, process: psutil.Process | None) -> None:
    """End a Ray actor at once. A stopped process ignores the request of Ray, so the process is killed too."""
    try:
        ray.kill(handle)
    finally:
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
