"""Thin Ray shell around one engine and its verifiers."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import (
    ObjectFetchTimedOutError,
    ObjectFreedError,
    ObjectLostError,
    ReferenceCountingAssertionError,
)

from actors.engine import Completion, Engine
from actors.engine_stats import EngineUsage
from actors.model_actor import RemoteWriter
from actors.rollouts.single_turn import build_group, completion_requests
from actors.search.build import build_codec, build_forest, model_settings
from actors.search.group import build_searched_group
from actors.search.scheduler import Forest
from actors.search.writers import WriterEngine
from actors.verifiers.pool import RewardPool
from actors.weights import LoadProgress, check_names, expected_tensors
from rlsys.config.schema import ActorsConfig, RewardsConfig, SamplingConfig
from rlsys.config.search import ExtractConfig, SearchConfig
from rlsys.config.tasks import TaskConfig
from rlsys.errors import EngineError, LearnerLostError, RolloutError, WeightSyncError
from rlsys.fault_injection import fault, identify
from rlsys.interfaces import WeightReceiver
from rlsys.models.folder import ModelFolder
from rlsys.processes import die_with_parent, quiet_worker
from rlsys.search.codec import TagCodec
from rlsys.transfer.object_store import ObjectStoreReceiver
from rlsys.trees import Tree, TreeFailure, Writer
from rlsys.types import (
    Float32Array,
    Int32Array,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    TrajectoryGroup,
    WeightAck,
    WeightManifest,
    WeightOffer,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSettings:
    """What an actor must know that does not change during the run.

    attempt: how many processes of this name there were before.
    search: None for an actor that is never asked to search.
    writer: what its own engine is to a tree: the policy, or, in `rlsys search`, search.model.
    writers, writer_paths: handles of the ModelActors of other writers, and the folders of their models.
    """

    name: str
    attempt: int
    model_path: Path
    device: str
    seed: int
    actors: ActorsConfig
    task: TaskConfig
    rewards: RewardsConfig
    log_file: str
    search: SearchConfig | None = None
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    writer: Writer = "policy"
    writers: Mapping[Writer, Sequence[Any]] = field(default_factory=dict)
    writer_paths: Mapping[Writer, Path] = field(default_factory=dict)


class RolloutActor:
    """Serves completions of the weights it last acknowledged."""

    def __init__(self, settings: ActorSettings) -> None:
        quiet_worker(settings.log_file)
        die_with_parent()
        identify("actor", settings.name, settings.attempt)
        self.name, self.extract = settings.name, settings.extract
        self.receiver: WeightReceiver = ObjectStoreReceiver(self.name, ray.get)
        self.loading, self.loaded = LoadProgress(), 0  # tensors of the last update, and of those before it
        self.beside = {name: RemoteWriter(handles, name) for name, handles in settings.writers.items()}
        self.waited = 0
        try:
            self.model = ModelFolder(settings.model_path)
            self.tokenizer = self.model.tokenizer
            self.tensors = expected_tensors(settings.model_path)
            ends = self.model.end_token_ids
            self.codec = self._codec(settings)
            strings = self.codec is not None and self.codec.needs_stop_strings
            self.engine = Engine(settings.model_path, settings.actors, settings.device, ends, stop_strings=strings)
            self.rewards = RewardPool(settings.task, settings.seed, settings.rewards)
            self.forest = self._forest(settings)
        except Exception:
            logger.exception("actor %s could not start", settings.name)
            raise

    def _codec(self, settings: ActorSettings) -> TagCodec | None:
        if settings.search is None:
            return None
        return build_codec(self.model, settings.search, model_settings(settings.search, settings.writer))

    def _forest(self, settings: ActorSettings) -> Forest | None:
        if settings.search is None or self.codec is None:
            return None
        others: dict[Writer, tuple[WriterEngine, ModelFolder]] = {
            name: (engine, ModelFolder(settings.writer_paths[name])) for name, engine in self.beside.items()
        }
        return build_forest(
            settings.writer,
            self.engine,
            self.model,
            self.codec,
            others,
            self.rewards,
            search=settings.search,
            sampling=settings.sampling,
            actors=settings.actors,
            seed=settings.seed,
        )

    async def start(self) -> tuple[str, int]:
        """Start the verifiers; answers with host and process id."""
        await self.rewards.start()
        return socket.gethostname(), os.getpid()

    async def progress(self) -> int:
        """Grows with every engine step, answer of another engine, verdict and tensor that is loaded.

        And while its own engine has nothing to do because another one owes it an answer: that one is watched itself.
        """
        self.waited += self.engine.idle and any(engine.owes for engine in self.beside.values())
        arrivals = self.forest.arrivals if self.forest else 0
        return self.engine.steps + arrivals + self.rewards.verdicts + self.loaded + self.loading.count + self.waited

    async def generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> list[TrajectoryGroup | RolloutFailure]:
        """A group for every prompt, in order."""
        fault("generate")
        requests = [completion_requests(prompt, settings) for prompt in prompts]
        futures = self.engine.submit([request for group in requests for request in group])
        outcomes = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        size = settings.samples
        groups = [self._finish(prompt, outcomes[size * i : size * (i + 1)]) for i, prompt in enumerate(prompts)]
        return list(await asyncio.gather(*groups))

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure:
        """Search one prompt."""
        if self.forest is None:
            raise EngineError(f"actor {self.name} was started without a search")
        fault("search")
        return await self.forest.grow(prompt)

    async def search(self, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        """The searched group of a prompt."""
        tree = await self.grow(prompt)
        if isinstance(tree, TreeFailure):
            return RolloutFailure(prompt=prompt, reason=tree.reason, tokens=tree.tokens)
        return build_searched_group(tree, prompt, cast(TagCodec, self.codec), self.extract)

    async def usage(self) -> EngineUsage:
        """What the engine did since the last call."""
        return self.engine.usage()

    async def search_seconds(self) -> float:
        """CPU seconds spent in the trees themselves so far."""
        return self.forest.search_s if self.forest else 0.0

    async def _finish(
        self, prompt: Prompt, outcomes: Sequence[Completion | BaseException]
    ) -> TrajectoryGroup | RolloutFailure:
        completions, refused = [], []
        for outcome in outcomes:
            if isinstance(outcome, RolloutError):
                refused.append(outcome.message)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                completions.append(outcome)
        if refused:
            tokens = sum(len(completion.token_ids) for completion in completions)
            return RolloutFailure(prompt=prompt, reason=refused[0], tokens=tokens)
        texts = self.tokenizer.batch_decode(
            [completion.token_ids[: _content_length(completion)] for completion in completions]
        )
        verdicts = await self.rewards.verify([(prompt.answer, text) for text in texts])
        return build_group(prompt, completions, verdicts)

    async def probe(self, rows: Sequence[Int32Array]) -> tuple[Float32Array, ...]:
        """Log-probabilities of given tokens under the weights served now."""
        return tuple(await asyncio.to_thread(self.engine.prompt_logprobs, rows))

    async def update_weights(self, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck:
        """Replace the weights between two engine steps, and return the probe's log-probabilities under them.

        Raises:
            WeightSyncError: a tensor is missing or damaged, or could not be loaded.
            LearnerLostError: the weights vanished with the learner rank that had sent them.
        """
        manifest = offer.manifest
        check_names(self.name, manifest, self.tensors)
        self.loaded += self.loading.count
        self.loading = tensors = LoadProgress(self.receiver.receive(offer))
        try:
            await asyncio.to_thread(self.engine.update_weights, manifest.version, manifest.attempt, tensors)
        except WeightSyncError:
            raise
        except (ObjectFetchTimedOutError, ObjectFreedError, ReferenceCountingAssertionError) as error:
            raise self._load_error(manifest, error) from error  # the rank lives, but this actor cannot reach it
        except ObjectLostError as error:  # the rank that had stored the bucket died
            raise LearnerLostError(
                f"weight version {manifest.version} was lost before actor {self.name} had all of it: "
                f"{type(error).__name__}"
            ) from error
        except Exception as error:
            raise self._load_error(manifest, error) from error
        scores = await self.probe(probe)
        return WeightAck(actor=self.name, version=manifest.version, attempt=manifest.attempt, probe_logprobs=scores)

    def _load_error(self, manifest: WeightManifest, error: Exception) -> WeightSyncError:
        return WeightSyncError(
            f"actor {self.name}, weight version {manifest.version}: loading failed at tensor {self.loading.last}: "
            f"{type(error).__name__}: {error}"
        )

    async def close(self) -> None:
        await self.rewards.close()
        await asyncio.to_thread(self.engine.close)


def _content_length(completion: Completion) -> int:
    """Tokens before the end token, which a completion that stopped by itself ends with."""
    return len(completion.token_ids) - (completion.finish_reason == "stop")
