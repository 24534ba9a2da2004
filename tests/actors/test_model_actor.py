"""The client of auxiliary engines: the engine of each request, answers and errors. Ray is not started."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors import model_actor
from actors.engine import CompletionRequest
from actors.model_actor import ModelActor, RemoteEngine
from rlsys.errors import EngineError, InputError, RolloutError


class Handle:
    """An actor handle that records requests. The test sets their answers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Future[Any]]] = []

    @property
    def complete(self) -> Handle:
        return self

    def remote(self, request: CompletionRequest, caller: str) -> Handle:
        assert caller == "0.0"
        self.requests.append((request.request_id, Future()))
        return self

    def future(self) -> Future[Any]:
        return self.requests[-1][1]


def request(name: str) -> CompletionRequest:
    return CompletionRequest(request_id=name, token_ids=(1,), seed=0, temperature=1.0, top_p=1.0, max_tokens=1)


def test_an_affinity_always_selects_the_same_engine() -> None:
    handles = [Handle(), Handle(), Handle()]
    engine = RemoteEngine(handles, "reviewer", "0.0")
    for affinity in (0, 4, 7, 2**63):  # 2 ** 63 = 2 mod 3, as 2 = -1 and 63 is odd
        engine.submit([request(f"{affinity}")], affinity)
    assert [[name for name, _ in handle.requests] for handle in handles] == [["0"], ["4", "7"], [str(2**63)]]


def test_a_completion_waits_for_no_other_of_its_batch() -> None:
    handle = Handle()
    slow, fast = RemoteEngine([handle], "reviewer", "0.0").submit([request("slow"), request("fast")])
    handle.requests[1][1].set_result("completion")
    assert fast.result(timeout=0) == "completion" and not slow.done()


def test_a_refused_request_fails_alone() -> None:
    handle = Handle()
    refused, good = RemoteEngine([handle], "reviewer", "0.0").submit([request("a"), request("b")])
    handle.requests[0][1].set_result(RolloutError("request a was refused: too long"))
    handle.requests[1][1].set_result("completion")
    with pytest.raises(RolloutError, match="^request a was refused: too long$"):
        refused.result(timeout=0)
    assert good.result(timeout=0) == "completion"


def test_unanswered_requests_are_open() -> None:
    handle = Handle()
    engine = RemoteEngine([handle], "reviewer", "0.0")
    is_open = [engine.has_open_requests]
    engine.submit([request("a"), request("b")])
    for (_, answered), outcome in zip(list(handle.requests), ("completion", RolloutError("too long")), strict=True):
        is_open.append(engine.has_open_requests)
        answered.set_result(outcome)
    assert [*is_open, engine.has_open_requests] == [False, True, True, False]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ActorDiedError(), "^reviewer engine 1 died: The actor died unexpectedly"),
        (RayTaskError("complete", "trace", ValueError("odd")), "^reviewer engine 1 failed: ValueError: odd$"),
        (RayTaskError("complete", "trace", EngineError("engine failed: no blocks")), "^engine failed: no blocks$"),
    ],
)
def test_a_failure_of_the_actor_is_an_engine_error(error: Exception, message: str) -> None:
    handle = Handle()
    (future,) = RemoteEngine([Handle(), handle], "reviewer", "0.0").submit([request("a")], 3)
    handle.requests[0][1].set_exception(error)
    with pytest.raises(EngineError, match=message):
        future.result(timeout=0)


def test_refused_settings_stay_an_error_of_the_input() -> None:
    handle = Handle()
    (refused,) = RemoteEngine([handle], "reviewer", "0.0").submit([request("a")])
    handle.requests[0][1].set_exception(RayTaskError("complete", "traceback", InputError("temperature 3")))
    with pytest.raises(InputError, match="^temperature 3$"):
        refused.result(timeout=0)


def test_a_cancelled_request_is_cancelled_at_its_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[Any] = []
    monkeypatch.setattr(model_actor.ray, "cancel", cancelled.append)
    handle = Handle()
    engine = RemoteEngine([handle], "reviewer", "0.0")
    gone, kept = engine.submit([request("a"), request("b")])
    gone.cancel()
    assert cancelled == [handle]
    handle.requests[1][1].set_result("completion")
    assert kept.result(timeout=0) == "completion" and not engine.has_open_requests
    assert cancelled == [handle]


def test_the_requests_of_a_lost_caller_are_aborted() -> None:
    actor = ModelActor.__new__(ModelActor)
    actor._open, actor._idle_checks = {}, 0
    futures: list[Future[Any]] = []

    def submit(requests: Sequence[CompletionRequest]) -> list[Future[Any]]:
        futures.append(Future())
        return futures[-1:]

    actor.engine = SimpleNamespace(submit=submit, steps=0)  # type: ignore[assignment]

    async def main() -> None:
        lost = asyncio.create_task(actor.complete(request("a"), "0.0"))
        kept = asyncio.create_task(actor.complete(request("b"), "1.0"))
        await asyncio.sleep(0)
        await actor.forget("0.0")
        await asyncio.gather(lost, return_exceptions=True)
        assert [future.cancelled() for future in futures] == [True, False] and lost.cancelled()
        assert await actor.progress() == 0, "a request is open"
        futures[1].set_result("completion")
        assert await kept == "completion"  # type: ignore[comparison-overlap]
        await actor.forget("0.0")
        assert await actor.progress() == 1

    asyncio.run(main())
