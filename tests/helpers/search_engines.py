"""Engines and verifiers of the scripted world in `search_world`, with random timing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from search_world import World, search_model, shipped

from actors.engine import Completion, CompletionRequest
from actors.search.requests import Call
from rlsys.search.codec import Stop
from rlsys.types import Problem, Verdict

WORLD = World(pattern=shipped("a"))


class ThreadEngine:
    """An engine that answers on another thread, a few requests at a time, in random order.

    Args:
        fails: Returns the error of a request, or None.
        silent: Returns whether a request is never answered.
    """

    def __init__(
        self,
        kind: str = "tags",
        *,
        seed: int = 0,
        fails: Callable[[CompletionRequest], Exception | None] = lambda request: None,
        silent: Callable[[CompletionRequest], bool] = lambda request: False,
    ) -> None:
        self._model, self._rng, self._fails, self._silent = (
            search_model(kind, 2000),
            random.Random(seed),
            fails,
            silent,
        )
        self._waiting: list[tuple[CompletionRequest, Future[Completion]]] = []
        self._changed = threading.Condition()
        self._open = True
        self.requests: list[CompletionRequest] = []
        self.futures: list[Future[Completion]] = []
        self.affinities: dict[str, set[int]] = {}
        self.in_flight: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        futures: list[Future[Completion]] = [Future() for _ in requests]
        with self._changed:
            self.futures += futures
            for request, future in zip(requests, futures, strict=True):
                self.requests.append(request)
                self.affinities.setdefault(request.request_id.split("/")[0], set()).add(affinity)
                if not self._silent(request):
                    self._waiting.append((request, future))
            self.in_flight.append(len(self._waiting))
            self._changed.notify()
        return futures

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                self._rng.shuffle(self._waiting)
                count = self._rng.randint(1, len(self._waiting))
                now, self._waiting = self._waiting[:count], self._waiting[count:]
            if self._rng.random() < 0.2:
                time.sleep(0.001)
            for request, future in now:
                error = self._fails(request)
                with contextlib.suppress(InvalidStateError):  # the tree has cancelled it
                    if error is not None:
                        future.set_exception(error)
                    else:
                        future.set_result(WORLD.complete(call_of(request), self._model))


def call_of(request: CompletionRequest) -> Call:
    """Return the call of the search that an engine request stands for."""
    return Call(
        role="policy",
        token_ids=list(request.token_ids),
        seed=request.seed,
        max_tokens=request.max_tokens,
        stop=Stop(token_ids=request.stop_token_ids, strings=request.stop_strings),
    )


OnVerdicts = Callable[[Sequence[tuple[int, Verdict]]], None]


@dataclass
class Judges:
    """A verifier that answers after a random time. It hangs on some chains and raises on others."""

    hangs: Callable[[str], bool] = lambda chain: False
    raises: Callable[[str], Exception | None] = lambda chain: None
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    async def verify(
        self, items: Sequence[tuple[Problem, str, bool]], on_verdicts: OnVerdicts | None = None
    ) -> list[Verdict]:
        return await asyncio.gather(*(self._judge(number, *item, on_verdicts) for number, item in enumerate(items)))

    async def _judge(
        self, number: int, problem: Problem, chain: str, finished: bool, on_verdicts: OnVerdicts | None
    ) -> Verdict:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)
        assert problem.answer == "1" and finished  # chains are judged at their answers alone
        if self.hangs(chain):
            await asyncio.Event().wait()
        error = self.raises(chain)
        if error is not None:
            raise error
        verdict = WORLD.judge(chain)
        if on_verdicts is not None:
            on_verdicts([(number, verdict)])
        return verdict
