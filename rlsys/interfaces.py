"""Protocols at the seams. The controller and the bus know these and nothing behind them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlsys.types import (
    Demonstration,
    Float32Array,
    Int32Array,
    Problem,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    Split,
    StepResult,
    TrajectoryGroup,
    Verdict,
    WeightAck,
    WeightManifest,
)


class Task(Protocol):
    """Prompts, verifier and demonstrations. Pure functions of (seed, split, index); no ray, no torch.

    Instances are picklable and are rebuilt from their config section in reward processes.
    """

    def size(self, split: Split) -> int | None:
        """Number of problems of a split, or None where a generator makes as many as wanted."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """The index-th problem. The same index gives the same problem in every process."""
        ...

    def verify(self, problem_answer: str, completion: str) -> Verdict:
        """Judge the text of a completion (what follows the prompt, without the end token)."""
        ...

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
        """The index-th worked example of the train split, or None where the task has none."""
        ...

    def vocabulary(self) -> tuple[str, ...]:
        """Strings that a from-scratch tokenizer makes single tokens: tags, words, characters."""
        ...


class RolloutPool(Protocol):
    """The fleet of actors."""

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]: ...

    async def update_weights(
        self, actor: int, manifest: WeightManifest, references: Sequence[Any], probe: Sequence[Int32Array]
    ) -> WeightAck: ...

    @property
    def count(self) -> int: ...


class Learner(Protocol):
    """The DeepSpeed ranks, seen as one."""

    async def begin_stage(self, stage: str, total_updates: int) -> None: ...

    async def train_online(self, groups: Sequence[TrajectoryGroup], step: int, version: int) -> StepResult: ...

    async def train_supervised(self, rows: Sequence[Demonstration], step: int, version: int) -> StepResult: ...

    async def export(self, version: int, probe: Sequence[Int32Array]) -> tuple[
        WeightManifest, Sequence[Any], tuple[Float32Array, ...]
    ]: ...

    async def save(self, folder: Path) -> Iterable[str]: ...

    async def load(self, folder: Path) -> None: ...
