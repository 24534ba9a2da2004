"""The engine's thread over a scripted stand-in for vLLM: failures reach everybody who waits."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from actors import engine as module
from actors.engine import Completion, CompletionRequest, Engine
from rlsys.config.schema import ActorsConfig
from rlsys.errors import EngineError, RolloutError

STEP_S = 0.02


class Script:
    """Finishes every request in the next step with what `output` says."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.params: list[Any] = []
        self.label = "3.0"
        self.fails_at_step = False
        self.fails_at_reload = False
        self.logprobs: Any = SimpleNamespace(logprobs=[-1.0, -2.0])

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 4:
            raise ValueError("longer than the maximum model length")
        self.added.append(request_id)
        self.params.append(params)

    def step(self) -> list[Any]:
        if self.fails_at_step:
            raise MemoryError("no blocks")
        done, self.added = self.added, []
        span = SimpleNamespace(start=0, version=self.label)
        out = SimpleNamespace(token_ids=[7, 2], logprobs=self.logprobs, finish_reason="stop", weight_versions=[span])
        time.sleep(STEP_S)
        prompt = {"prompt_token_ids": [1, 2], "num_cached_tokens": 1}
        return [SimpleNamespace(finished=True, request_id=name, outputs=[out], **prompt) for name in done]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        for name, _ in kwargs["weights_iterator"]:
            if self.fails_at_reload and name == "b":
                raise RuntimeError("size mismatch")

    def set_weight_version(self, version: str) -> None:
        self.label = version


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
    return future.result(timeout=120)  # a future nobody resolves fails the test instead of hanging it


def test_a_completion_comes_back_with_its_spans(engine: Engine) -> None:
    (found,) = map(outcome, engine.submit([request(1, 2)]))
    assert found.token_ids.tolist() == [7, 2] and found.logprobs.tolist() == [-1.0, -2.0]
    assert [(span.start, span.version, span.attempt) for span in found.versions] == [(0, 3, 0)]


def test_the_spans_tell_a_version_from_one_of_the_same_number(engine: Engine) -> None:
    found = []
    for attempt in (0, 2):
        engine.update_weights(65, attempt, [])
        (completion,) = map(outcome, engine.submit([request(1, 2)]))
        found += [(span.version, span.attempt) for span in completion.versions]
    assert found == [(65, 0), (65, 2)]


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


class Cancelled(Future[Any]):
    """The event loop cancels it between a look at it and the answer."""

    def done(self) -> bool:
        found = super().done()
        self.cancel()
        return found

    def set_result(self, result: Any) -> None:
        self.cancel()
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        self.cancel()
        super().set_exception(exception)


def test_a_caller_that_leaves_at_the_last_moment_breaks_nothing(
    script: Script, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave() -> Future[Completion]:
        with monkeypatch.context() as patched:
            patched.setattr(module, "Future", Cancelled)
            return engine.submit([request(1)])[0]

    left = leave()
    assert outcome(engine.submit([request(2)])[0]).finish_reason == "stop"
    assert left.cancelled()
    script.fails_at_step = True
    left, stays = leave(), engine.submit([request(2)])[0]
    with pytest.raises(EngineError, match="MemoryError: no blocks"):
        outcome(stays)
    assert left.cancelled()


@pytest.mark.parametrize("busy", ["step", "collective_rpc"])
def test_an_engine_is_idle_only_while_it_waits_for_a_command(script: Script, engine: Engine, busy: str) -> None:
    reached, go_on = threading.Event(), threading.Event()
    original = getattr(script, busy)

    def held(*arguments: Any, **named: Any) -> Any:
        reached.set()
        assert go_on.wait(20)
        return original(*arguments, **named)

    def becomes_idle() -> bool:
        deadline = time.monotonic() + 20
        while not engine.idle and time.monotonic() < deadline:
            time.sleep(0.001)
        return engine.idle

    setattr(script, busy, held)
    assert becomes_idle()
    asks = {"step": lambda: engine.submit([request(1)]), "collective_rpc": lambda: engine.update_weights(4, 0, [])}
    asking = threading.Thread(target=asks[busy])
    asking.start()
    assert reached.wait(20) and not engine.idle
    go_on.set()
    asking.join(20)
    assert becomes_idle()


def test_an_interrupted_update_poisons_the_engine(script: Script, engine: Engine) -> None:
    script.fails_at_reload = True
    tensors: list[Any] = [("a", None), ("b", None)]
    with pytest.raises(RuntimeError, match="size mismatch"):
        engine.update_weights(4, 0, tensors)
    with pytest.raises(EngineError, match="size mismatch"):
        outcome(engine.submit([request(1)])[0])
    with pytest.raises(EngineError, match="size mismatch"):
        engine.update_weights(5, 0, [])


def test_a_request_stops_at_end_tokens_and_its_own(script: Script, engine: Engine) -> None:
    (future,) = engine.submit([replace(request(1), stop_token_ids=(9, 2))])
    outcome(future)
    (params,) = script.params
    assert params.stop_token_ids == [2, 9]
    assert params.stop == [] and not params.detokenize  # nothing to look for in the text


def test_stop_strings_stay_in_the_output(script: Script) -> None:
    engine = Engine(module.Path("unused"), ActorsConfig(), "cpu", [2], stop_strings=True)
    try:
        outcome(engine.submit([replace(request(1), stop_strings=("</a>",))])[0])
    finally:
        engine.close()
    (params,) = script.params
    assert params.stop == ["</a>"] and params.detokenize and params.include_stop_str_in_output
    assert not params.skip_special_tokens  # they may be part of a stop string


def test_stop_strings_without_a_tokenizer_are_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ValueError, match="stop_strings=True"):
        engine.submit([replace(request(1), stop_strings=("</a>",))])


def test_usage_counts_from_question_to_question(engine: Engine) -> None:
    for future in engine.submit([request(1), request(2), request(3)]):
        assert (outcome(future).prompt_tokens, outcome(future).cached_tokens) == (2, 1)
    first = engine.usage()
    # One step with three requests, each of 2 tokens, a prompt of 2 and 1 of it cached.
    assert (first.generated_tokens, first.prompt_tokens, first.cached_tokens) == (6, 6, 3)
    assert first.in_flight_mean == 3.0
    assert first.busy_s >= STEP_S
    time.sleep(5 * STEP_S)  # idle
    second = engine.usage()
    assert second.wall_s >= 5 * STEP_S
    assert (second.busy_s, second.in_flight_mean, second.generated_tokens) == (0.0, 0.0, 0)
