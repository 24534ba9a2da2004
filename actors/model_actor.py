"""Thin Ray shell around one engine of another model, and the handle by which trees have their nodes written there."""

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

from ray.exceptions import RayError

from actors.engine import Completion, CompletionRequest, Engine
from actors.engine_stats import EngineUsage
from rlsys.config.schema import ActorsConfig
from rlsys.errors import RolloutError, WriterLostError
from rlsys.models.folder import ModelFolder
from rlsys.processes import die_with_parent, quiet_worker
from rlsys.ray_errors import translated

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What the actor must know. actors: the settings of its engine."""

    name: str
    model_path: Path
    device: str
    actors: ActorsConfig
    log_file: str


class ModelActor:
    """Serves completions of a model that is not trained."""

    def __init__(self, settings: ModelSettings) -> None:
        quiet_worker(settings.log_file)
        die_with_parent()
        self.name = settings.name
        self._waited, self._asked = 0, 0
        try:
            ends = ModelFolder(settings.model_path).end_token_ids
            self.engine = Engine(settings.model_path, settings.actors, settings.device, ends, stop_strings=True)
        except Exception:
            logger.exception("%s could not start", settings.name)
            raise

    async def start(self) -> tuple[str, int]:
        """Answers with host and process id once it is up."""
        return socket.gethostname(), os.getpid()

    async def complete(self, request: CompletionRequest) -> Completion | RolloutError:
        """What the engine drew, or why it refused the request."""
        (future,) = self.engine.submit([request])
        self._asked += 1
        try:
            return await asyncio.wrap_future(future)
        except RolloutError as error:
            return error
        finally:
            self._asked -= 1

    async def progress(self) -> int:
        """Grows with every engine step, and while there is nothing to do."""
        self._waited += not self._asked
        return self.engine.steps + self._waited

    async def usage(self) -> EngineUsage:
        """What the engine has done since the last call of this."""
        return self.engine.usage()

    async def close(self) -> None:
        await asyncio.to_thread(self.engine.close)


class RemoteWriter:
    """WriterEngine over the actors of one model.

    Every request is a call of its own, so that none waits for another of its batch.

    Args:
        name: of the model in error messages.
    """

    def __init__(self, handles: Sequence[Any], name: str) -> None:
        self._handles = handles
        self._name = name
        self._open: set[Future[Completion]] = set()

    @property
    def owes(self) -> bool:
        """Whether a request is without its answer."""
        return bool(self._open)

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        number = affinity % len(self._handles)
        who, complete = f"{self._name} engine {number}", self._handles[number].complete
        futures: list[Future[Completion]] = [Future() for _ in requests]
        for request, future in zip(requests, futures, strict=True):
            answered = complete.remote(request).future()
            self._open.add(future)
            future.add_done_callback(self._open.discard)
            answered.add_done_callback(partial(_settle, future, who))
        return futures


def _settle(future: Future[Completion], who: str, answered: Future[Completion | RolloutError]) -> None:
    """Hand on what an actor answered; its failure in our own words."""
    error = CancelledError() if answered.cancelled() else answered.exception()
    with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
        if error is None:
            outcome = answered.result()
            if isinstance(outcome, RolloutError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        else:
            lost = WriterLostError(translated(error, who).message) if isinstance(error, RayError) else error
            future.set_exception(lost)
