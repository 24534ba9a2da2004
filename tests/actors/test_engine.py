"""The engine's thread over a scripted stand-in for vLLM."""

from __future__ import annotations

import importlib
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_weights import deliveries
from vllm.exceptions import VLLMValidationError

from actors import engine as module
from actors.engine import Completion, CompletionRequest, Engine
from rlsys.config.schema import ActorsConfig
from rlsys.errors import EngineError, InputError, RaisedError, RolloutError

STEP_S = 0.02


class Script:
    """An engine that finishes every request in the next step, always with the same two tokens."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.params: list[Any] = []
        self.label = "3.0"
        self.refusal: Exception = ValueError("longer than the maximum model length")
        self.fails_at_step: Exception | None = None
        self.fails_at_reload = False
        self.holds = False  # whether no request ends
        self.aborted: list[str] = []
        self.logprobs: Any = SimpleNamespace(logprobs=[-1.0, -2.0])
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(batch_queue=None))

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 4:
            raise self.refusal
        if 99 in params.stop_token_ids:
            raise VLLMValidationError("99 in stop_token_ids", parameter="stop_token_ids", value=[99])
        self.added.append(request_id)
        self.params.append(params)

    def step(self) -> list[Any]:
        if self.fails_at_step:
            raise self.fails_at_step
        done, self.added = ([], self.added) if self.holds else (self.added, [])
        span = SimpleNamespace(start=0, version=self.label)
        out = SimpleNamespace(token_ids=[7, 2], logprobs=self.logprobs, finish_reason="stop", weight_versions=[span])
        time.sleep(STEP_S)
        prompt = {"prompt_token_ids": [1, 2], "num_cached_tokens": 1}
        return [SimpleNamespace(finished=True, request_id=name, outputs=[out], **prompt) for name in done]

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> list[Any]:
        if self.fails_at_reload and method == "update_weights":
            raise RuntimeError("size mismatch")
        return [None]

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        self.added = [name for name in self.added if name not in request_ids]

    def set_weight_version(self, version: str) -> None:
        self.label = version


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    importlib.import_module("vllm.sampling_params")  # takes up to 30 s on a busy machine, and no future waits for it
    scripted = Script()
    monkeypatch.setattr(module, "build_engine", lambda *_, **__: scripted)
    return scripted


@pytest.fixture
def engine(script: Script) -> Any:
    running = Engine(module.Path("unused"), ActorsConfig(), "cpu", [2])
    yield running
    running.close()


def request(*token_ids: int, name: str = "p#0") -> CompletionRequest:
    return CompletionRequest(request_id=name, token_ids=token_ids, seed=1, temperature=1.0, top_p=1.0, max_tokens=4)


def outcome(future: Future[Completion]) -> Completion:
    return future.result(timeout=20)  # a future without a result fails the test instead of hanging it


def test_a_completion_comes_back_with_its_spans(engine: Engine) -> None:
    (completion,) = map(outcome, engine.submit([request(1, 2)]))
    assert completion.token_ids.tolist() == [7, 2] and completion.logprobs.tolist() == [-1.0, -2.0]
    assert [(span.start, span.version, span.attempt) for span in completion.versions] == [(0, 3, 0)]


def test_the_spans_distinguish_attempts_at_the_same_version(engine: Engine) -> None:
    spans = []
    for attempt in (0, 2):
        engine.update_weights(65, attempt, [])
        (completion,) = map(outcome, engine.submit([request(1, 2)]))
        spans += [(span.version, span.attempt) for span in completion.versions]
    assert spans == [(65, 0), (65, 2)]


def test_two_requests_with_the_same_name_both_finish(engine: Engine) -> None:
    assert len([outcome(future) for future in engine.submit([request(1), request(1)])]) == 2


def test_a_refused_request_fails_alone(engine: Engine) -> None:
    long, good = engine.submit([request(1, 2, 3, 4, 5, name="long#0"), request(1)])
    with pytest.raises(RolloutError, match="long#0 was refused: longer than"):
        outcome(long)
    assert outcome(good).finish_reason == "stop"


def test_a_request_that_vllm_itself_refuses_fails_alone(script: Script, engine: Engine) -> None:
    script.refusal = VLLMValidationError("longer than the model")  # no ValueError
    long, good = engine.submit([request(1, 2, 3, 4, 5, name="long#0"), request(1)])
    with pytest.raises(RolloutError, match="long#0 was refused: longer than"):
        outcome(long)
    assert outcome(good).finish_reason == "stop"


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"temperature": 3.0}, "temperature must be in"), ({"top_p": 1.5}, "top_p"), ({"stop_token_ids": (99,)}, "99 in")],
)
def test_refused_settings_are_an_error_of_the_input(engine: Engine, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"refuses the sampling settings or end tokens: .*{message}"):
        outcome(engine.submit([replace(request(1), **changed)])[0])
    assert outcome(engine.submit([request(1)])[0]).finish_reason == "stop"  # the engine itself is not broken


@pytest.mark.parametrize(("error", "again"), [(IndexError("index out of range"), True), (MemoryError("blocks"), False)])
def test_a_broken_engine_says_whether_another_would_break_too(
    script: Script, engine: Engine, error: Exception, again: bool
) -> None:
    script.fails_at_step = error
    with pytest.raises(EngineError, match=rf"^engine failed: {type(error).__name__}: {error}$") as caught:
        outcome(engine.submit([request(1)])[0])
    assert isinstance(caught.value, RaisedError) == again


def test_a_failed_step_breaks_the_engine_for_good(script: Script, engine: Engine) -> None:
    script.fails_at_step = MemoryError("no blocks")
    futures = engine.submit([request(1), request(2)])
    for future in [*futures, *engine.submit([request(3)])]:
        with pytest.raises(EngineError, match="MemoryError: no blocks"):
            outcome(future)
    script.fails_at_step = None  # too late: a broken engine is not used again
    with pytest.raises(EngineError, match="no blocks"):
        outcome(engine.submit([request(4)])[0])


def test_an_unreadable_output_breaks_the_engine(script: Script, engine: Engine) -> None:
    script.logprobs = None
    with pytest.raises(EngineError, match="AttributeError"):
        outcome(engine.submit([request(1)])[0])


class Cancelled(Future[Any]):
    """A future that the event loop cancels between a check of its state and its result."""

    def done(self) -> bool:
        is_done = super().done()
        self.cancel()
        return is_done

    def set_result(self, result: Any) -> None:
        self.cancel()
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        self.cancel()
        super().set_exception(exception)


def test_a_future_that_is_cancelled_at_the_last_moment_breaks_nothing(
    script: Script, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit_cancelled() -> Future[Completion]:
        with monkeypatch.context() as patched:
            patched.setattr(module, "Future", Cancelled)
            return engine.submit([request(1)])[0]

    cancelled = submit_cancelled()
    assert outcome(engine.submit([request(2)])[0]).finish_reason == "stop"
    assert cancelled.cancelled()
    script.fails_at_step = MemoryError("no blocks")
    cancelled, waiting = submit_cancelled(), engine.submit([request(2)])[0]
    with pytest.raises(EngineError, match="MemoryError: no blocks"):
        outcome(waiting)
    assert cancelled.cancelled()


@pytest.mark.parametrize("busy", ["step", "collective_rpc"])
def test_an_engine_is_idle_only_while_it_waits_for_a_command(script: Script, engine: Engine, busy: str) -> None:
    reached, go_on = threading.Event(), threading.Event()
    original = getattr(script, busy)

    def delayed(*arguments: Any, **named: Any) -> Any:
        reached.set()
        assert go_on.wait(20)
        return original(*arguments, **named)

    def becomes_idle() -> bool:
        deadline = time.monotonic() + 20
        while not engine.idle and time.monotonic() < deadline:
            time.sleep(0.001)
        return engine.idle

    setattr(script, busy, delayed)
    assert becomes_idle()
    work = {"step": lambda: engine.submit([request(1)]), "collective_rpc": lambda: engine.update_weights(4, 0, [])}
    thread = threading.Thread(target=work[busy])
    thread.start()
    assert reached.wait(20) and not engine.idle
    go_on.set()
    thread.join(20)
    assert becomes_idle()


def test_a_request_that_nobody_waits_for_is_aborted_and_takes_no_step(script: Script, engine: Engine) -> None:
    script.holds = True
    gone, kept = engine.submit([request(1), request(2)])
    while len(script.added) < 2:
        time.sleep(0.001)
    assert gone.cancel()
    while not script.aborted:
        time.sleep(0.001)
    assert script.aborted == ["1"] and script.added == ["2"]
    script.holds = False
    assert outcome(kept).finish_reason == "stop"
    deadline = time.monotonic() + 20
    while not engine.idle and time.monotonic() < deadline:
        time.sleep(0.001)
    steps = engine.steps
    time.sleep(3 * STEP_S)
    assert engine.steps == steps, "no step is made for an aborted request"


def test_a_request_cancelled_before_its_turn_never_reaches_the_engine(script: Script, engine: Engine) -> None:
    script.holds = True
    (first,) = engine.submit([request(1)])
    while not script.added:
        time.sleep(0.001)
    (second,) = engine.submit([request(2)])  # queued behind the present step
    assert second.cancel()
    script.holds = False
    outcome(first)
    assert len(script.params) <= 2
    (third,) = engine.submit([request(3)])
    outcome(third)
    assert script.added == [] and engine._pending == {}


def test_weights_change_only_where_no_batch_is_in_flight(script: Script, engine: Engine) -> None:
    script.engine_core.engine_core.batch_queue = ["a batch"]
    with pytest.raises(EngineError, match="a batch is in flight at a change of weights"):
        engine.update_weights(4, 0, [])
    assert script.label == "3.0"


def test_an_interrupted_update_breaks_the_engine(script: Script, engine: Engine) -> None:
    script.fails_at_reload = True
    with pytest.raises(RuntimeError, match="size mismatch"):
        engine.update_weights(4, 0, deliveries([("a", torch.zeros(4)), ("b", torch.zeros(4))], 4))
    with pytest.raises(EngineError, match="size mismatch"):
        outcome(engine.submit([request(1)])[0])
    with pytest.raises(EngineError, match="size mismatch"):
        engine.update_weights(5, 0, [])


def test_a_request_stops_at_end_tokens_and_its_own(script: Script, engine: Engine) -> None:
    (future,) = engine.submit([replace(request(1), stop_token_ids=(9, 2))])
    outcome(future)
    (params,) = script.params
    assert params.stop_token_ids == [2, 9]
    assert params.stop == [] and not params.detokenize  # there are no strings to find in the text


def test_stop_strings_stay_in_the_output(script: Script) -> None:
    engine = Engine(module.Path("unused"), ActorsConfig(), "cpu", [2], stop_strings=True)
    try:
        outcome(engine.submit([replace(request(1), stop_strings=("</a>",))])[0])
    finally:
        engine.close()
    (params,) = script.params
    assert params.stop == ["</a>"] and params.detokenize and params.include_stop_str_in_output
    assert not params.skip_special_tokens  # special tokens may be part of a stop string


def test_stop_strings_without_a_tokenizer_are_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ValueError, match="stop_strings=True"):
        engine.submit([replace(request(1), stop_strings=("</a>",))])


def test_engine_stats_cover_the_time_since_the_last_call(engine: Engine) -> None:
    for future in engine.submit([request(1), request(2), request(3)]):
        assert (outcome(future).prompt_tokens, outcome(future).cached_tokens) == (2, 1)
    first = engine.engine_stats()
    # One step with three requests, each of 2 tokens, a prompt of 2 and 1 of it cached.
    assert (first.generated_tokens, first.prompt_tokens, first.cached_tokens) == (6, 6, 3)
    assert first.in_flight_mean == 3.0
    assert first.busy_s >= STEP_S
    time.sleep(5 * STEP_S)  # idle
    second = engine.engine_stats()
    assert second.wall_s >= 5 * STEP_S
    assert (second.busy_s, second.in_flight_mean, second.generated_tokens) == (0.0, 0.0, 0)
