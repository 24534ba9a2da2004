"""The engine's thread over a scripted stand-in for vLLM: failures reach everybody who waits."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from actors import engine as module
from actors.engine import Completion, CompletionRequest, Engine
from rlsys.config import ActorsConfig
from rlsys.errors import EngineError, RolloutError


class Script:
    """Finishes every request in the next step with what `output` says."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.fails_at_step = False
        self.fails_at_reload = False
        self.logprobs: Any = SimpleNamespace(logprobs=[-1.0, -2.0])

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 4:
            raise ValueError("longer than the maximum model length")
        self.added.append(request_id)

    def step(self) -> list[Any]:
        if self.fails_at_step:
            raise MemoryError("no blocks")
        done, self.added = self.added, []
        span = SimpleNamespace(start=0, version="3")
        out = SimpleNamespace(token_ids=[7, 2], logprobs=self.logprobs, finish_reason="stop", weight_versions=[span])
        return [SimpleNamespace(finished=True, request_id=name, outputs=[out]) for name in done]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        for name, _ in kwargs["weights_iterator"]:
            if self.fails_at_reload and name == "b":
                raise RuntimeError("size mismatch")

    def set_weight_version(self, version: str) -> None:
        pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    found = Script()
    monkeypatch.setattr(module, "_build", lambda *_: found)
    return found


@pytest.fixture
def engine(script: Script) -> Any:
    found = Engine(module.Path("unused"), ActorsConfig(), "cpu", [2])
    yield found
    found.close()


def request(*token_ids: int, name: str = "p#0") -> CompletionRequest:
    return CompletionRequest(request_id=name, token_ids=token_ids, seed=1, temperature=1.0, top_p=1.0, max_tokens=4)


def outcome(future: Future[Completion]) -> Completion:
    return future.result(timeout=20)  # a future nobody resolves fails the test instead of hanging it


def test_a_completion_comes_back_with_its_spans(engine: Engine) -> None:
    (found,) = map(outcome, engine.submit([request(1, 2)]))
    assert found.token_ids.tolist() == [7, 2] and found.logprobs.tolist() == [-1.0, -2.0]
    assert [(span.start, span.version) for span in found.versions] == [(0, 3)]


def test_two_requests_of_one_name_both_come_back(engine: Engine) -> None:
    assert len([outcome(future) for future in engine.submit([request(1), request(1)])]) == 2


def test_a_refused_request_fails_alone(engine: Engine) -> None:
    long, good = engine.submit([request(1, 2, 3, 4, 5, name="long#0"), request(1)])
    with pytest.raises(RolloutError, match="long#0 was refused: longer than"):
        outcome(long)
    assert outcome(good).finish_reason == "stop"


def test_a_failed_step_fails_all_and_stays_failed(script: Script, engine: Engine) -> None:
    script.fails_at_step = True
    futures = engine.submit([request(1), request(2)])
    for future in [*futures, *engine.submit([request(3)])]:
        with pytest.raises(EngineError, match="MemoryError: no blocks"):
            outcome(future)
    script.fails_at_step = False  # too late: nothing more is asked of a broken engine
    with pytest.raises(EngineError, match="no blocks"):
        outcome(engine.submit([request(4)])[0])


def test_an_output_that_cannot_be_read_fails_its_own_request_too(script: Script, engine: Engine) -> None:
    script.logprobs = None
    with pytest.raises(EngineError, match="AttributeError"):
        outcome(engine.submit([request(1)])[0])


def test_an_interrupted_update_poisons_the_engine(script: Script, engine: Engine) -> None:
    script.fails_at_reload = True
    tensors: list[Any] = [("a", None), ("b", None)]
    with pytest.raises(RuntimeError, match="size mismatch"):
        engine.update_weights(4, tensors)
    with pytest.raises(EngineError, match="size mismatch"):
        outcome(engine.submit([request(1)])[0])
    with pytest.raises(EngineError, match="size mismatch"):
        engine.update_weights(5, [])
