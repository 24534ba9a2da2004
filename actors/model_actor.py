"""Thin Ray shell around one auxiliary engine, and the client through which actors use such engines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from actors.engine import Completion, CompletionRequest, Engine
from rlsys.config.schema import ActorsConfig
from rlsys.errors import AuxiliaryEngineLostError, InputError, RolloutError
from rlsys.interfaces import EngineStats
from rlsys.models.folder import ModelFolder
from rlsys.processes import die_with_parent, quiet_worker
from rlsys.ray_errors import translated

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Settings of one ModelActor.

    Attributes:
        actors: Settings of its engine.
    """

    name: str
    model_path: Path
    device: str
    actors: ActorsConfig
    log_file: str


class ModelActor:
    """Ray actor that samples with a model that is not trained."""

    def __init__(self, settings: ModelSettings) -> None:
        quiet_worker(settings.log_file)
        die_with_parent()
        self.name = settings.name
        self._idle_checks = 0
        self._open: dict[str, set[Future[Any]]] = {}  # by caller
        try:
            ends = ModelFolder(settings.model_path).end_token_ids
            self.engine = Engine(settings.model_path, settings.actors, settings.device, ends, stop_strings=True)
        except Exception:
            logger.exception("%s could not start", settings.name)
            raise

    async def start(self) -> tuple[str, int]:
        """Return host and process id."""
        return socket.gethostname(), os.getpid()

    async def complete(self, request: CompletionRequest, caller: str) -> Completion | RolloutError:
        """Return the completion, or the error of a refused request.

        Args:
            caller: Name of the calling process.
        """
        (future,) = self.engine.submit([request])
        outcome: Completion | RolloutError = await self._outcome(future, caller)
        return outcome

    async def _outcome(self, future: Future[Any], caller: str) -> Any:
        """Return the result of an open request of a caller, or the error of a refused request."""
        self._open.setdefault(caller, set()).add(future)
        try:
            return await asyncio.wrap_future(future)
        except RolloutError as error:
            return error
        finally:
            self._open.get(caller, set()).discard(future)

    async def score(self, token_ids: Sequence[int], tokens: int | None, caller: str) -> Any:
        """Return ids and log-probabilities of a row, as `Engine.token_scores` does, or the error of a refused row."""
        return await self._outcome(self.engine.token_scores([token_ids], tokens)[0], caller)

    async def forget(self, caller: str) -> None:
        """Abort all requests of a process that is lost."""
        for future in self._open.pop(caller, set()):
            future.cancel()

    async def progress(self) -> int:
        """Return a number that grows with every engine step, and with every call while no request is open."""
        self._idle_checks += not any(self._open.values())
        return self.engine.steps + self._idle_checks

    async def engine_stats(self) -> EngineStats:
        """Return the engine's statistics since the last call."""
        return self.engine.engine_stats()

    async def close(self) -> None:
        await asyncio.to_thread(self.engine.close)


class RemoteEngine:
    """CompletionEngine over the ModelActors of one role.

    Every request is a separate remote call, so that no request waits for the rest of its batch.

    Args:
        name: Role of the engines, for error messages.
        caller: Name of this process.
    """

    def __init__(self, handles: Sequence[Any], name: str, caller: str) -> None:
        self._handles = handles
        self._name, self._caller = name, caller
        self._open: set[Future[Any]] = set()

    @property
    def has_open_requests(self) -> bool:
        return bool(self._open)

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        index = affinity % len(self._handles)
        complete = self._handles[index].complete
        return [self._answer(index, complete.remote(request, self._caller)) for request in requests]

    def score(self, token_ids: Sequence[int], tokens: int | None, affinity: int) -> Future[Any]:
        """Return a future for the scores of a row; see `Engine.token_scores`."""
        index = affinity % len(self._handles)
        return self._answer(index, self._handles[index].score.remote(token_ids, tokens, self._caller))

    def _answer(self, index: int, reference: Any) -> Future[Any]:
        """Return a future for the answer of an engine."""
        future: Future[Any] = Future()
        self._open.add(future)
        future.add_done_callback(partial(self._settled, reference))
        reference.future().add_done_callback(partial(_settle, future, f"{self._name} engine {index}"))
        return future

    def _settled(self, reference: Any, future: Future[Completion]) -> None:
        """Forget a request; one that its caller has cancelled is cancelled at the engine, too."""
        self._open.discard(future)
        if future.cancelled():
            ray.cancel(reference)


def _settle(future: Future[Any], engine_name: str, reply: Future[Any]) -> None:
    """Copy an actor's reply to the caller's future. Turn a Ray error into an AuxiliaryEngineLostError."""
    error = CancelledError() if reply.cancelled() else reply.exception()
    with contextlib.suppress(InvalidStateError):  # the caller has cancelled the future
        if isinstance(error, RayError):
            ours = translated(error, engine_name)
            lost = AuxiliaryEngineLostError(ours.message)
            future.set_exception(ours if isinstance(ours, InputError) else lost)
        elif error is not None:
            future.set_exception(error)
        elif isinstance(outcome := reply.result(), RolloutError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
