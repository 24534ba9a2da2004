"""The fleet and the learner ranks behind Ray handles. Every call has a deadline and names who failed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rlsys.config import Config, StageName
from rlsys.errors import EngineError
from rlsys.ray_errors import translated
from rlsys.search_engines import trees_ahead
from rlsys.stage_settings import stage_settings
from rlsys.trees import SearchUsage, Tree, TreeFailure, Writer
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


@dataclass(frozen=True, slots=True)
class _Engine:
    """An actor with an engine. writer: what that is to a tree; who: the actor in error messages."""

    writer: Writer
    number: int
    who: str
    handle: Any


class RayRolloutPool:
    """RolloutPool over Ray actors.

    Args:
        writer: what the actors' own engines are to a tree.
        beside: handles of the engines of other models, by what they are to a tree.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        config: Config,
        writer: Writer = "policy",
        beside: Mapping[Writer, Sequence[Any]] | None = None,
    ) -> None:
        self._handles = handles
        self._engines = [_Engine(writer, number, f"actor {number}", handle) for number, handle in enumerate(handles)]
        for other, found in (beside or {}).items():
            self._engines += [_Engine(other, n, f"{other} engine {n}", handle) for n, handle in enumerate(found)]
        self._config = config
        self._turns = [asyncio.Semaphore(trees_ahead(config)) for _ in handles]

    @property
    def count(self) -> int:
        return len(self._handles)

    async def start(self) -> None:
        await asyncio.gather(*self._each("start", self._config.actors.start_timeout_s, "actors.start_timeout_s"))

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        timeout = self._config.actors.rollout_timeout_s
        return await self._call(actor, "generate", timeout, "actors.rollout_timeout_s", list(prompts), settings)

    async def search(self, actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        timeout = self._config.actors.rollout_timeout_s
        async with self._turns[actor]:  # a deadline should not run while a tree only waits for others
            return await self._call(actor, "search", timeout, "actors.rollout_timeout_s", prompt)

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        """The finished tree of a prompt."""
        timeout = self._config.actors.rollout_timeout_s
        tree: Tree | TreeFailure = await self._call(actor, "grow", timeout, "actors.rollout_timeout_s", prompt)
        return tree

    async def search_usage(self) -> list[SearchUsage]:
        """What every engine has done since the last call of this: the actors' own, then those beside them."""
        calls = self._each("usage", self._config.actors.rollout_timeout_s, "actors.rollout_timeout_s")
        found = await asyncio.gather(*calls)
        return [
            SearchUsage(model=engine.writer, engine=engine.number, **asdict(usage))
            for engine, usage in zip(self._engines, found, strict=True)
        ]

    async def probe(self, actor: int, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        return await self._call(actor, "probe", self._config.weight_sync.timeout_s, "weight_sync.timeout_s", list(rows))

    async def update_weights(
        self, actor: int, manifest: WeightManifest, references: Sequence[Any], probe: Sequence[Int32Array]
    ) -> WeightAck:
        timeout = self._config.weight_sync.timeout_s + 10  # the bus times out first and names the version
        return await self._call(
            actor, "update_weights", timeout, "weight_sync.timeout_s", manifest, list(references), list(probe)
        )

    async def close(self) -> None:
        await asyncio.gather(*self._each("close", 5.0, "the shutdown"), return_exceptions=True)

    def _each(self, method: str, timeout_s: float, field: str) -> list[Coroutine[Any, Any, Any]]:
        """A call of every engine, those beside the actors included."""
        return [
            answer(getattr(engine.handle, method).remote(), timeout_s, engine.who, field) for engine in self._engines
        ]

    async def _call(self, actor: int, method: str, timeout_s: float, field: str, *arguments: Any) -> Any:
        reference = getattr(self._handles[actor], method).remote(*arguments)
        return await answer(reference, timeout_s, f"actor {actor}", field)


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
