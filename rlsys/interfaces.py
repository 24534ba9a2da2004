"""Define the protocols between the controller, the actors, the learner and the tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlsys.trees import SearchUsage
from rlsys.types import (
    Float32Array,
    Int32Array,
    Preference,
    Problem,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    Split,
    StageName,
    TrainingBatch,
    TrajectoryGroup,
    Verdict,
    WeightAck,
    WeightManifest,
)

# Compares what an actor acknowledged with the learner's log-probabilities of the probe.
Verify = Callable[[WeightAck, Sequence[Float32Array]], None]


class Task(Protocol):
    """Problems, verifier and demonstrations: pure functions of seed, split and index, without ray and torch.

    Instances are picklable. Verifier processes rebuild them from their config section.
    """

    @property
    def one_answer(self) -> bool:
        """Whether `Problem.answer` is the only correct answer. If not, `verify` accepts several answers."""
        ...

    def size(self, split: Split) -> int | None:
        """Return the number of problems of a split, or None for an unlimited generator."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with an index, which is the same in every process."""
        ...

    def verify(self, problem_answer: str, completion: str) -> Verdict:
        """Judge the text of a completion, which excludes the prompt and the end token."""
        ...

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str] | None:
        """Return the worked example with an index in the train split, or None if the task has no examples."""
        ...

    def digest(self) -> str:
        """Return the sha256 of the data that was read, or "" without data. A resume requires the same digest."""
        ...

    def notes(self) -> tuple[str, ...]:
        """Return notes for the user about the data that was read, one line each, such as skipped rows."""
        ...

    def vocabulary(self) -> tuple[str, ...]:
        """Return the strings that a from-scratch tokenizer makes single tokens: tags, words and characters."""
        ...


class RolloutPool(Protocol):
    """The fleet of actors, by number from 0; where one is lost, another answers. Every call has a deadline."""

    count: int

    @property
    def restarts(self) -> int:
        """Actors that were lost and replaced so far."""
        ...

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        """A group or failure for every prompt, in order."""
        ...

    async def search(self, actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        """The searched group of a prompt, or why there is none."""
        ...

    async def engine_stats(self) -> Sequence[SearchUsage]:
        """Return what every engine, auxiliary ones included, has done since the last call of this or of the reset."""
        ...

    async def reset_engine_stats(self) -> None:
        """Start a new interval of `engine_stats`."""
        ...

    async def probe(self, actor: int, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        """Log-probabilities of given rows under the weights served now, [T-1] each."""
        ...

    async def publish(
        self,
        manifest: WeightManifest,
        references: Sequence[Any],
        probe: Sequence[Int32Array],
        check: Callable[[WeightAck], object],
    ) -> None:
        """Bring every actor to new weights; `check` raises WeightSyncError where an acknowledgement is not enough."""
        ...


class Learner(Protocol):
    """The DeepSpeed ranks, seen as one."""

    @property
    def restarts(self) -> int:
        """Attempts before the present one, since the command began."""
        ...

    async def start_stage(self, stage: StageName, policy: Path, resume: Path | None, reference: Path | None) -> None:
        """Build the engines for a stage from a policy folder.

        resume: a checkpoint of the same stage. reference: the frozen policy of the KL term and of the step's own pairs.
        """
        ...

    async def train(self, batch: TrainingBatch, step: int, version: int) -> Mapping[str, float]:
        """One training step: `step` of the stage, from 0, makes the weights `version`. Names of rlsys.run.metrics."""
        ...

    async def score_pairs(self, pairs: Sequence[Preference]) -> Sequence[tuple[float, float]]:
        """What a reference policy must tell of pairs: the scores of chosen and rejected side under the present policy.

        A score is the sum of the log-probabilities of the tokens that the preference loss compares, in nats.
        """
        ...

    async def export(
        self, version: int, probe: Sequence[Int32Array]
    ) -> tuple[WeightManifest, Sequence[Any], Sequence[Float32Array]]:
        """Buckets of the full parameters, a reference to each, and the probe's log-probabilities."""
        ...

    async def save(self, folder: Path) -> None:
        """Write policy/ and learner/ below the folder."""
        ...


class WeightChannel(Protocol):
    """How parameters get from the learner into every actor. It drives both sides, so a collective transfer fits."""

    async def transfer(self, version: int, probe: Sequence[Int32Array], verify: Verify) -> WeightManifest:
        """Bring the learner's present parameters into all actors; returns when each serves them.

        verify: raises WeightSyncError where an acknowledgement does not agree with the learner's log-probabilities.
        """
        ...
