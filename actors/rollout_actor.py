"""Thin Ray shell around one engine and its verifiers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, cast

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectFetchTimedOutError,
    ObjectFreedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    ReferenceCountingAssertionError,
)

from actors.adapter_loading import served_adapter
from actors.engine import Completion, Engine
from actors.model_actor import RemoteEngine
from actors.rollouts.multi_turn import Episodes
from actors.rollouts.single_turn import build_group, completion_requests, items_to_judge, name_failures
from actors.search.build import build_codec, build_scheduler
from actors.search.engines import CompletionEngine
from actors.search.group import build_searched_group
from actors.search.scheduler import TreeScheduler
from actors.settings import ActorSettings
from actors.teacher import Teacher
from actors.verifiers.pool import RewardPool
from actors.weights import CheckedDeliveries, expected_tensors
from rlsys.config.search_values import FunctionValueConfig
from rlsys.errors import EngineError, LearnerLostError, RlsysError, RolloutError, WeightSyncError
from rlsys.fault_injection import fault, identify
from rlsys.interfaces import EngineStats, WeightReceiver
from rlsys.models.folder import ModelFolder
from rlsys.processes import die_with_parent, quiet_worker
from rlsys.search.codec import TagCodec
from rlsys.transfer.object_store import BucketReceiver, Delivery
from rlsys.transfer.pipeline import prefetched
from rlsys.transfer.shelf import BucketReply, BucketRequest
from rlsys.trees import Role, Tree, TreeFailure
from rlsys.types import Float32Array, Int32Array, Prompt, RolloutFailure, SamplingSettings, TrajectoryGroup
from rlsys.weight_types import WeightAck, WeightOffer

logger = logging.getLogger(__name__)
Finishing = Coroutine[Any, Any, TrajectoryGroup | RolloutFailure]


class RolloutActor:
    """Ray actor that samples and searches with the weights that it last acknowledged."""

    def __init__(self, settings: ActorSettings) -> None:
        quiet_worker(settings.log_file)
        die_with_parent()
        identify("actor", settings.name, settings.attempt)
        self.name, self.extract = settings.name, settings.extract
        self.weight_timeout_s = settings.weight_timeout_s
        member = f"{settings.name}.{settings.attempt}"
        self.receiver: WeightReceiver = BucketReceiver(self.name, member, self._ask_learner, ray.get)
        self.loading = CheckedDeliveries(self.name, 0)  # of the latest weight update
        self.loaded = 0  # tensors of all earlier weight updates
        self.auxiliary: dict[Role, RemoteEngine] = {
            role: RemoteEngine(handles, role, member) for role, handles in settings.auxiliary_handles.items()
        }
        self.teacher = Teacher(settings.teacher, member) if settings.teacher else None
        self.waited = 0
        try:
            self.model = ModelFolder(settings.model_path)
            self.tokenizer = self.model.tokenizer
            adapter = served_adapter(settings)
            self.tensors = adapter.expected if adapter else expected_tensors(settings.model_path)
            end_ids = self.model.end_token_ids
            search = settings.search
            self.codec = build_codec(self.model, search, settings.role) if search else None
            stop_strings = self.codec is not None and self.codec.needs_stop_strings
            self.engine = Engine(
                settings.model_path,
                settings.actors,
                settings.device,
                end_ids,
                stop_strings=stop_strings or bool(settings.environment and settings.environment.stop),
                sleeps=settings.shares_device,
                name=self.name,
                adapter=adapter,
            )
            self.rewards = self._reward_pool(settings)
            self.episodes = self._episodes(settings)
            self.scheduler = self._scheduler(settings)
        except Exception:
            logger.exception("actor %s could not start", settings.name)
            raise

    def _reward_pool(self, settings: ActorSettings) -> RewardPool:
        value = settings.search.value if settings.search else None
        return RewardPool(
            settings.task,
            settings.seed,
            settings.rewards,
            folder=settings.folder,
            value=value if isinstance(value, FunctionValueConfig) else None,
            environment=settings.environment,
        )

    def _scheduler(self, settings: ActorSettings) -> TreeScheduler | None:
        if settings.search is None or self.codec is None:
            return None
        engines: dict[Role, CompletionEngine] = {settings.role: self.engine}
        engines |= {role: engine for role, engine in self.auxiliary.items() if role != "judge"}
        judge = self.auxiliary.get("judge")
        return build_scheduler(settings, settings.search, self.model, self.codec, engines, self.rewards, judge)

    def _episodes(self, settings: ActorSettings) -> Episodes | None:
        """Return the episodes with the environment in use; None without one."""
        environment, longest = settings.environment, settings.actors.max_model_len
        if environment is None:
            return None
        return Episodes(self.engine, self.rewards, self.tokenizer, self.model.end_token_ids, environment, longest)

    async def start(self) -> tuple[str, int]:
        """Start the verifiers and return host and process id."""
        await self.rewards.start()
        return socket.gethostname(), os.getpid()

    async def progress(self) -> int:
        """Return a number that grows with every engine step, completion, verdict, loaded tensor and learner's answer.

        The number also grows with every call while this actor's engine is idle and an auxiliary engine has an open
        request: the watchdog watches auxiliary engines separately.
        """
        others = [*self.auxiliary.values(), *([self.teacher.engine] if self.teacher else [])]
        self.waited += self.engine.idle and any(engine.has_open_requests for engine in others)
        arrivals = self.scheduler.arrivals if self.scheduler else 0
        weights = self.loaded + self.loading.count + self.receiver.answers
        return self.engine.steps + arrivals + self.rewards.verdicts + weights + self.waited

    async def generate(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> list[TrajectoryGroup | RolloutFailure]:
        """Return a group or failure for every prompt, in order."""
        fault("generate")
        starting = self.episodes.start(prompts, settings) if self.episodes else self._sample(prompts, settings)
        groups = await starting
        if self.teacher and settings.teacher:
            groups = [self._scored(group) for group in groups]
        return list(await asyncio.gather(*groups))

    async def _sample(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[Finishing]:
        """Draw the completions of prompts without an environment, and return their groups, to be awaited."""
        requests = [completion_requests(prompt, settings) for prompt in prompts]
        futures = self.engine.submit([request for group in requests for request in group])
        outcomes = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        size = settings.samples
        return [self._finish(prompt, outcomes[size * i : size * (i + 1)]) for i, prompt in enumerate(prompts)]

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure:
        """Return the tree of a prompt."""
        if self.scheduler is None:
            raise EngineError(f"actor {self.name} was started without a search")
        fault("search")
        return await self.scheduler.grow(prompt)

    async def search(self, prompt: Prompt) -> TrajectoryGroup | RolloutFailure:
        """Return the group of a searched prompt."""
        tree = await self.grow(prompt)
        if isinstance(tree, TreeFailure):
            return RolloutFailure(prompt=prompt, reason=tree.reason, tokens=tree.tokens)
        group = build_searched_group(tree, prompt, cast(TagCodec, self.codec), self.extract)
        return await self.teacher.score_group(group) if self.teacher else group

    async def _scored(self, finishing: Finishing) -> TrajectoryGroup | RolloutFailure:
        """Return a group with the scores of the teacher."""
        assert self.teacher is not None  # noqa: S101 - the caller has asked for it
        return await self.teacher.score_group(await finishing)

    async def engine_stats(self) -> EngineStats:
        """Return the engine's statistics since the last call."""
        return self.engine.engine_stats()

    async def search_seconds(self) -> float:
        """Return the CPU seconds spent on tree operations so far; see `TreeScheduler.search_s`."""
        return self.scheduler.search_s if self.scheduler else 0.0

    async def _finish(
        self, prompt: Prompt, outcomes: Sequence[Completion | BaseException]
    ) -> TrajectoryGroup | RolloutFailure:
        """Return the group of a prompt, or a failure if the engine refused one of its requests."""
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
        verdicts = await self.rewards.verify(items_to_judge(prompt, completions, texts))
        return build_group(prompt, completions, name_failures(verdicts, texts))

    async def probe(self, rows: Sequence[Int32Array]) -> tuple[Float32Array, ...]:
        """Return the log-probabilities of the given rows under the present weights, [T-1] each."""
        return tuple(await asyncio.to_thread(self.engine.prompt_logprobs, rows))

    async def update_weights(self, offer: WeightOffer, probe: Sequence[Int32Array]) -> WeightAck:
        """Replace the weights between two engine steps, and return the probe's log-probabilities under them.

        Raises:
            WeightSyncError: a tensor is missing or damaged, or could not be loaded.
            LearnerLostError: the learner rank that had sent the weights died, and its weights were lost.
        """
        self.loaded += self.loading.count
        # The first bucket is here before generation stops, and later ones arrive while the engine loads.
        self.loading = CheckedDeliveries(self.name, offer.version)
        try:
            arriving = await asyncio.to_thread(_begun, prefetched(self.receiver.receive(offer)))
            self.loading = CheckedDeliveries(self.name, offer.version, arriving, self.tensors.all)
            await asyncio.to_thread(
                self.engine.update_weights, offer.version, offer.attempt, self.loading, self.tensors.tied_output
            )
        except RlsysError:
            raise
        except (ObjectFetchTimedOutError, ObjectFreedError, ReferenceCountingAssertionError) as error:
            raise self._load_error(offer.version, error) from error  # the rank lives, but this actor cannot reach it
        except ObjectLostError as error:  # the rank that had stored the bucket died
            raise LearnerLostError(
                f"weight version {offer.version} was lost before actor {self.name} had all of it: "
                f"{type(error).__name__}"
            ) from error
        except Exception as error:
            raise self._load_error(offer.version, error) from error
        scores = await self.probe(probe)
        return WeightAck(actor=self.name, version=offer.version, attempt=offer.attempt, probe_logprobs=scores)

    def _ask_learner(self, rank: Any, request: BucketRequest) -> BucketReply:
        """Ask learner rank 0 for a bucket.

        Raises:
            LearnerLostError: the rank died or does not answer.
            WeightSyncError: the rank lives, but this actor cannot reach it.
        """
        version = f"weight version {request.version}"
        try:
            return ray.get(rank.take.remote(request), timeout=self.weight_timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, RlsysError):
                raise error.cause from None
            raise
        except ActorUnavailableError as error:
            raise WeightSyncError(f"actor {self.name}, {version}: {type(error).__name__}: {error}") from None
        except (RayActorError, GetTimeoutError) as error:
            raise LearnerLostError(
                f"{version} was lost before actor {self.name} had all of it: {type(error).__name__}"
            ) from None

    def _load_error(self, version: int, error: Exception) -> WeightSyncError:
        return WeightSyncError(
            f"actor {self.name}, weight version {version}: loading failed in the bucket that starts with tensor "
            f"{self.loading.first}: {type(error).__name__}: {error}"
        )

    async def sleep(self) -> None:
        """Free the device: weights go to the host."""
        fault("engine.sleep")
        await asyncio.to_thread(self.engine.sleep)

    async def wake(self) -> None:
        """Take the device back."""
        await asyncio.to_thread(self.engine.wake)

    async def close(self) -> None:
        await self.rewards.close()
        await asyncio.to_thread(self.engine.close)


def _content_length(completion: Completion) -> int:
    """Return the number of tokens of a completion without its end token."""
    return len(completion.token_ids) - (completion.finish_reason == "stop")


def _begun(deliveries: Iterator[Delivery]) -> Iterator[Delivery]:
    """Return an iterator over the same buckets once the first one is there."""
    first = list(itertools.islice(deliveries, 1))
    return itertools.chain(first, deliveries)
