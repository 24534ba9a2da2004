"""The fleet and the learner ranks behind Ray handles. Every call has a deadline and names who failed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlsys import errors
from rlsys.config import Config, StageName
from rlsys.errors import EngineError, RlsysError
from rlsys.types import (
    Demonstration,
    Float32Array,
    Int32Array,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    TrajectoryGroup,
    WeightAck,
    WeightManifest,
)

MAX_CAUSE = 1000  # characters of what an actor raised


async def answer(reference: ray.ObjectRef, timeout_s: float, who: str, field: str) -> Any:
    """The value of a remote call.

    Args:
        field: the config field that holds the deadline.
    Raises:
        RlsysError: the remote error itself where it is one of ours; else EngineError naming `who`.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RlsysError):
            raise error.cause from None
        raise EngineError(f"{who} failed: {type(error.cause).__name__}: {error.cause}") from error
    except TimeoutError:  # ours: a remote TimeoutError is a RayTaskError as well
        raise EngineError(f"{who} did not answer within {field} = {timeout_s} s") from None
    except RayActorError as error:
        raise death(str(error), who) from error
    except RayError as error:
        raise EngineError(f"{who} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error


def death(text: str, who: str) -> RlsysError:
    """The error for a dead actor, from Ray's account of it.

    What an actor raised in its __init__ is known here only as a traceback; one of our errors becomes itself again.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    raised = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")
    starts = [number for number, line in enumerate(lines) if number and raised.match(line)] or [len(lines) - 1]
    cause = " ".join(" ".join(lines[starts[-1] :]).split())[:MAX_CAUSE]
    name, _, message = cause.partition(": ")
    kind = getattr(errors, name.removeprefix("rlsys.errors."), None) if name.startswith("rlsys.errors.") else None
    if isinstance(kind, type) and issubclass(kind, RlsysError):
        return kind(f"{who}: {message}")
    return EngineError(f"{who} died: {cause}")


class RayRolloutPool:
    """RolloutPool over Ray actors."""

    def __init__(self, handles: Sequence[Any], config: Config) -> None:
        self._handles = handles
        self._config = config
        self._tokens = [0] * len(handles)
        self._seconds = [0.0] * len(handles)

    @property
    def count(self) -> int:
        return len(self._handles)

    async def start(self) -> None:
        calls = [
            self._call(i, "start", self._config.actors.start_timeout_s, "actors.start_timeout_s")
            for i in range(self.count)
        ]
        await asyncio.gather(*calls)

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        timeout = self._config.actors.rollout_timeout_s
        groups, seconds = await self._call(
            actor, "generate", timeout, "actors.rollout_timeout_s", list(prompts), settings
        )
        self._tokens[actor] += sum(
            t.completion_length for group in groups if isinstance(group, TrajectoryGroup) for t in group.trajectories
        )
        self._seconds[actor] += seconds
        return groups

    def tokens_per_s(self) -> float:
        rates = [tokens / seconds for tokens, seconds in zip(self._tokens, self._seconds, strict=True) if seconds]
        self._tokens, self._seconds = [0] * self.count, [0.0] * self.count
        return sum(rates)

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
        calls = [self._call(i, "close", 5.0, "the shutdown") for i in range(self.count)]
        await asyncio.gather(*calls, return_exceptions=True)

    async def _call(self, actor: int, method: str, timeout_s: float, field: str, *arguments: Any) -> Any:
        reference = getattr(self._handles[actor], method).remote(*arguments)
        return await answer(reference, timeout_s, f"actor {actor}", field)


class RayLearner:
    """Learner over one Ray actor per DeepSpeed rank. A failure on one rank is the failure of all."""

    def __init__(self, handles: Sequence[Any], config: Config) -> None:
        self._handles = handles
        self._config = config

    async def start_stage(self, stage: StageName, policy: Path, resume: Path | None, reference: Path | None) -> None:
        section = self._config.warm_start if stage == "warm_start" else self._config.train
        updates = 1 if stage == "warm_start" else self._config.train.updates_per_step
        await self._all("start_stage", policy, section.optimizer, section.max_steps * updates, resume, reference)

    async def train_online(self, groups: Sequence[TrajectoryGroup], version: int) -> Mapping[str, float]:
        shared = ray.put(list(groups))  # one copy for all ranks
        return (await self._all("train_online", shared, self._config.train.updates_per_step, version))[0]

    async def train_supervised(self, rows: Sequence[Demonstration], version: int) -> Mapping[str, float]:
        return (await self._all("train_supervised", list(rows), version))[0]

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
