"""Define the protocols between the controller, the actors, the learner and the tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    WeightOffer,
)

CheckAck = Callable[[WeightAck], object]
"""Raises WeightSyncError if the acknowledgement of an actor is not good enough."""


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
    """The fleet of actors, numbered from 0. If an actor is lost, another one answers. Every call has a deadline."""

    count: int

    @property
    def restarts(self) -> int:
        """Actors that were lost and replaced so far."""
        ...

    async def generate(
        self, actor: int, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Sequence[TrajectoryGroup | RolloutFailure]:
        """Return a group or failure for every prompt, in order."""
        ...

    async def search(self, actor: int, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        """Return the searched group of a prompt, or the failure of its search."""
        ...

    async def engine_stats(self) -> Sequence[SearchUsage]:
        """Return what every engine, auxiliary ones included, has done since the last call of this or of the reset."""
        ...

    async def reset_engine_stats(self) -> None:
        """Start a new interval of `engine_stats`."""
        ...

    async def probe(self, actor: int, rows: Sequence[Int32Array]) -> Sequence[Float32Array]:
        """Return the log-probabilities of given rows under the weights served now, `[T-1]` each."""
        ...

    async def publish(
        self, transfer: WeightTransfer, offer: WeightOffer, probe: Sequence[Int32Array], check: CheckAck
    ) -> None:
        """Bring every actor to an offered version, and from then on every actor that comes late.

        Args:
            transfer: the transport of the offer, for actors that come late.
            offer: the version that the learner sent.
            probe: rows of token ids, `[T]` each, that every actor scores with the new weights.
            check: judges every acknowledgement.
        """
        ...


class Learner(Protocol):
    """The DeepSpeed ranks, seen as one."""

    @property
    def restarts(self) -> int:
        """Attempts before the present one, since the command began."""
        ...

    async def start_stage(self, stage: StageName, policy: Path, resume: Path | None, reference: Path | None) -> None:
        """Build the engines for a stage from a policy folder.

        Args:
            stage: name of the stage.
            policy: the policy folder.
            resume: a checkpoint of the same stage, to continue from.
            reference: folder of the reference policy, for the KL term and for the pairs that a step makes itself.
        """
        ...

    async def train(self, batch: TrainingBatch, step: int, version: int) -> Mapping[str, float]:
        """Make one training step.

        Args:
            batch: the data of the step.
            step: number of the step in its stage, from 0.
            version: weight version that the step makes.

        Returns:
            Values by metric name, see `rlsys.run.metrics`.
        """
        ...

    async def score_pairs(self, pairs: Sequence[Preference]) -> Sequence[tuple[float, float]]:
        """Return the scores of the chosen and the rejected side of every pair under the present policy.

        A score is the sum of the log-probabilities of the tokens that the preference loss compares, in nats. The
        scores under a reference policy come from here as well, while the learner holds it as its policy.
        """
        ...

    async def score(self, probe: Sequence[Int32Array]) -> Sequence[Float32Array]:
        """Return the log-probabilities of given rows under the present policy, `[T-1]` each. Nothing is sent."""
        ...

    async def send(self, version: int) -> WeightOffer:
        """Hand the present weights of the policy to the transport, as `version`."""
        ...

    async def save(self, folder: Path) -> None:
        """Write the files of policy and learner below the folder."""
        ...


class WeightTransfer(Protocol):
    """A transport of weights, as the driver sees it.

    A transport has three parts. In the learner, a WeightSender makes an offer out of the present weights. In every
    actor, a WeightReceiver makes tensors out of the offer. In the driver, the WeightTransfer decides how long a version
    stays available. The bus, the fleet and the controller pass offers on and do not look into them.
    """

    async def send(self, version: int) -> WeightOffer:
        """Let the learner send its present weights; the offer is for all actors that are up."""
        ...

    async def offer_for_late_actor(self, version: int) -> WeightOffer:
        """Return an offer of the published version for one actor that came up after its publish.

        The learner may already train towards the next version, so its present weights are not an answer. A transport
        repeats its offer, or asks its sender for the weights that the sender keeps.

        Raises:
            LearnerLostError: the weights were lost with the learner.
            WeightSyncError: the version is not available any more.
        """
        ...

    def acknowledged(self) -> None:
        """Note that every actor serves the version that was sent last. Versions before it may be released."""
        ...


class WeightSender(Protocol):
    """The part of a transport in learner rank 0."""

    def send(self, tensors: Iterator[tuple[str, Any]], *, version: int, attempt: int) -> WeightOffer:
        """Take all tensors of the policy, by name, and return the offer of them.

        The tensors are valid only during the call: the next training step changes them.

        Args:
            tensors: name and value of every tensor; whole, detached.
            version: weight version of these tensors.
            attempt: as in `rlsys.types.VersionSpan`.
        """
        ...


class WeightReceiver(Protocol):
    """The part of a transport in an actor."""

    def receive(self, offer: WeightOffer) -> Iterator[tuple[str, Any]]:
        """Yield name and value of every tensor of an offer, after its checksum agreed.

        Raises:
            WeightSyncError: the bytes differ from those that were sent; names actor, tensor and version.
        """
        ...
