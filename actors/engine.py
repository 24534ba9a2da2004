"""One vLLM engine inside this process, stepped by one thread.

All work on the engine runs on that thread between two engine steps: new requests, and new weights. So a weight update
never interrupts a step, and requests in flight continue with the new weights. vLLM reports the weight version of every
output token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from actors.adapter_loading import ServedAdapter, build_loader
from actors.engine_build import build_engine, engine_environment, weight_label
from actors.engine_stats import Meter
from rlsys.config.schema import ActorsConfig
from rlsys.errors import EngineError, InputError, RolloutError, failed
from rlsys.interfaces import EngineStats
from rlsys.transfer.object_store import Delivery
from rlsys.types import FinishReason, Float32Array, Int32Array, VersionSpan

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
SHARED_SETTINGS = ("temperature", "top_p", "stop_token_ids", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """One completion to draw. Prompt, weights and seed decide its tokens.

    The completion ends at the first end token, stop token, or token that completes a stop string in the drawn text,
    and otherwise after `max_tokens`. The last token is part of the completion.
    """

    request_id: str
    token_ids: Sequence[int]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A drawn completion.

    Attributes:
        token_ids: [T] int32.
        logprobs: [T] float32, nats, of the distribution sampled from (after temperature and top_p).
        versions: Spans of tokens that one weight version sampled; `start` is an index into token_ids.
        prompt_tokens: Length of the prompt.
        cached_tokens: Number of prompt tokens found in the prefix cache.
    """

    token_ids: Int32Array
    logprobs: Float32Array
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Engine:
    """A running engine. All public methods may be called from any thread. Cancelling a future aborts its request.

    After a failed step or update the engine is broken: every future raises EngineError from then on.

    Args:
        end_token_ids: Tokens that end a completion.
        stop_strings: Whether to load the model's tokenizer, so that requests may have stop strings.
        sleeps: Whether the engine shares its device with the learner.
        name: Name of the actor, for error messages.
        adapter: The adapter that all requests use; None to serve the model as it is.

    Attributes:
        steps: Number of engine steps so far.
        idle: Whether the engine has no request and no command.
        asleep: Whether the device belongs to another process, so that requests are refused.
    """

    def __init__(
        self,
        model_path: Path,
        config: ActorsConfig,
        device: str,
        end_token_ids: Sequence[int],
        *,
        stop_strings: bool = False,
        sleeps: bool = False,
        name: str = "0",
        adapter: ServedAdapter | None = None,
    ) -> None:
        os.environ.update(engine_environment(config, device))
        self._end_token_ids = list(end_token_ids)
        self._stop_strings = stop_strings
        spec = adapter.spec if adapter else None
        self._engine = build_engine(model_path, config, device, stop_strings=stop_strings, sleeps=sleeps, spec=spec)
        self._meter = Meter()
        self._loader = build_loader(name, self._engine, config.tensor_parallel_size == 1, adapter)
        self._updates = 0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending: dict[str, _Pending] = {}
        self._requests = 0
        self.steps = 0
        self.idle = True
        self.asleep = False
        self._broken: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        """Add all requests between the same two engine steps, so that the batch does not depend on their timing.

        Args:
            affinity: Not used here. It selects one of several engines; see `actors.search.engines.CompletionEngine`.

        Returns:
            A future for every request, in order.

        Raises:
            ValueError: A request has stop strings, but the engine was built with `stop_strings=False`.
        """
        if not self._stop_strings and any(request.stop_strings for request in requests):
            raise ValueError("stop strings need an engine with a tokenizer: Engine(..., stop_strings=True)")
        futures: list[Future[Completion]] = [Future() for _ in requests]

        def add() -> None:
            started = time.monotonic()
            for request, future in zip(requests, futures, strict=True):
                self._add(request, future)
            self._meter.add_time(time.monotonic() - started)

        self._call(add, lambda error: _fail(futures, error))
        return futures

    def prompt_logprobs(self, rows: Sequence[Int32Array]) -> list[Float32Array]:
        """Return log p(token t+1 | tokens 0..t) for every row, [T-1] each, in nats. No cached prefix is used."""
        return [future.result()[1][:, 0] for future in self.token_scores(rows, None)]

    def token_scores(
        self, rows: Sequence[Sequence[int] | Int32Array], tokens: int | None
    ) -> list[Future[tuple[Int32Array, Float32Array]]]:
        """Return futures for the log-probabilities of tokens after each prefix of rows of T tokens.

        A future has ids and log-probabilities in nats, at temperature 1, [T-1, K] each. No cached prefix is used.

        Args:
            tokens: K, the number of the most probable tokens; None for the row's own token alone, K = 1.
        """
        futures: list[Future[Any]] = [Future() for _ in rows]

        def add() -> None:
            for row, future in zip(rows, futures, strict=True):
                self._score(row, tokens, future)

        self._call(add, lambda error: _fail(futures, error))
        return futures

    def update_weights(
        self, version: int, attempt: int, deliveries: Iterable[Delivery], tied_output: str | None = None
    ) -> None:
        """Replace all weights between two steps (`BucketLoader.load`). Prefixes of older weights are not used again."""

        def apply() -> None:
            try:
                self._check_between_steps()
                self._loader.load(deliveries, tied_output)
            except BaseException as error:
                self._break(error)  # the model may have a mixture of old and new weights
                raise
            self._updates += 1
            self._engine.set_weight_version(weight_label(version, attempt))

        self._run_on_thread(apply).result()

    def sleep(self) -> None:
        """Move the weights to the host and drop the cache, between two steps. A device without sleep keeps both."""
        self.asleep = True
        self._run_on_thread(lambda: self._engine.sleep(1, "keep")).result()

    def wake(self) -> None:
        """Move the weights back and make a new cache."""
        self._run_on_thread(self._engine.wake_up).result()
        self.asleep = False

    def engine_stats(self) -> EngineStats:
        """Return the engine's statistics since the last call."""
        return self._meter.take()

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join(timeout=10)

    def _call(self, function: Callable[[], None], fail: Callable[[BaseException], None]) -> None:
        """Queue a function for the engine's thread. `fail` gets the error of the function or of a broken engine."""

        def command() -> None:
            try:
                if self._broken is not None:
                    raise self._broken
                function()
            except BaseException as error:  # noqa: BLE001 - the caller's future gets it; the thread must go on
                fail(error)

        self._commands.put(command)

    def _run_on_thread(self, function: Callable[[], Result]) -> Future[Result]:
        """Queue a function for the engine's thread and return a future for its result."""
        future: Future[Result] = Future()
        self._call(lambda: future.set_result(function()), lambda error: _fail([future], error))
        return future

    # --- everything below runs on the engine's thread ---

    def _run(self) -> None:
        """Step the engine until `close`. The loop outlives a failure, so that later commands get the error."""
        while self._take_commands(block=not self._pending):
            if self._pending:
                started = time.monotonic()
                try:
                    outputs = self._engine.step()
                    self.steps += 1
                    self._meter.add_step(time.monotonic() - started, len(self._pending))
                    for output in outputs:
                        if output.finished and output.request_id in self._pending:  # not aborted meanwhile
                            self._pending[output.request_id].finish(output)
                            del self._pending[output.request_id]
                except BaseException as error:  # noqa: BLE001 - every waiting future gets it
                    self._break(error)

    def _break(self, error: BaseException) -> None:
        """Fail all waiting requests, and all later ones, with an EngineError."""
        logger.exception("the engine failed")
        self._broken = failed("engine", error)
        _fail([pending.future for pending in self._pending.values()], self._broken)
        self._pending.clear()

    def _check_between_steps(self) -> None:
        """Raise if the engine sleeps or a batch is in flight, whose tokens would get a wrong label."""
        if self.asleep or getattr(self._engine.engine_core.engine_core, "batch_queue", None):
            raise EngineError("the engine sleeps, or a batch is in flight at a change of weights; expected neither")

    def _take_commands(self, block: bool) -> bool:
        """Run all waiting commands. With `block`, wait for the first one. Return False after `close`."""
        while block or not self._commands.empty():
            self.idle = block
            command = self._commands.get()
            self.idle = False
            if command is None:
                return False
            command()
            block = False
        return True

    def _add(self, request: CompletionRequest, future: Future[Completion]) -> None:
        settings = _sampling_settings(request, self._end_token_ids)
        self._start(request.request_id, request.token_ids, settings, _Pending(future, self._completion))

    def _score(self, row: Sequence[int] | Int32Array, tokens: int | None, future: Future[Any]) -> None:
        settings = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": tokens or 0, "detokenize": False}
        self._start("row to score", row, settings, _Pending(future, lambda output: _read_scores(output, row, tokens)))

    def _completion(self, output: Any) -> Completion:
        completion = _read_completion(output)
        self._meter.add_completion(len(completion.token_ids), completion.prompt_tokens, completion.cached_tokens)
        return completion

    def _start(self, name: str, token_ids: Sequence[int] | Int32Array, settings: Any, pending: _Pending) -> None:
        """Give a request to the engine. InputError: it refuses a setting that all requests share."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        if pending.future.cancelled():
            return
        if self.asleep:
            raise EngineError(f"request {name} came while the engine sleeps")
        self._requests += 1
        request_id = str(self._requests)  # unique, unlike the callers' names
        try:
            prompt, options = self._prompt(token_ids), self._loader.request_options
            self._engine.add_request(request_id, prompt, SamplingParams(**settings), **options)
        except (ValueError, VLLMClientError) as error:  # for example longer than max_model_len
            if getattr(error, "parameter", None) in SHARED_SETTINGS:
                raise InputError(f"the engine refuses the sampling settings or end tokens: {error}") from error
            _fail([pending.future], RolloutError(f"request {name} was refused: {error}"))
        else:
            self._pending[request_id] = pending
            pending.future.add_done_callback(lambda future: self._abandon(request_id, future))

    def _abandon(self, request_id: str, future: Future[Any]) -> None:
        """Abort a request whose future was cancelled, so that no step is spent on it. Runs on any thread."""

        def abort() -> None:
            if self._pending.pop(request_id, None):
                self._engine.abort_request([request_id])

        if future.cancelled():
            self._call(abort, self._break_for)

    def _break_for(self, error: BaseException) -> None:
        if error is not self._broken:
            self._break(error)

    def _prompt(self, token_ids: Sequence[int] | Int32Array) -> dict[str, Any]:
        # The salt keeps the engine from using prefixes that older weights computed. A weight version cannot be the
        # salt, because the same version comes again after a rollback.
        return {"prompt_token_ids": [int(token) for token in token_ids], "cache_salt": f"u{self._updates}"}


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request of the engine, and the function that reads its output."""

    future: Future[Any]
    read: Callable[[Any], Any]

    def finish(self, output: Any) -> None:
        result = self.read(output)
        with contextlib.suppress(InvalidStateError):  # the event loop may cancel the future at any moment
            self.future.set_result(result)


def _fail(futures: Sequence[Future[Any]], error: BaseException) -> None:
    for future in futures:
        with contextlib.suppress(InvalidStateError):  # it was cancelled or already has its result
            future.set_exception(error)


def _sampling_settings(request: CompletionRequest, end_token_ids: Sequence[int]) -> dict[str, Any]:
    """Return vLLM's sampling parameters of a request."""
    from vllm.sampling_params import RequestOutputKind

    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "logprobs": 0,
        "flat_logprobs": True,
        "stop_token_ids": [*end_token_ids, *request.stop_token_ids],
        "stop": list(request.stop_strings),
        "detokenize": bool(request.stop_strings),
        "skip_special_tokens": False,  # a stop string may contain a special token
        "include_stop_str_in_output": True,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }


def _read_completion(output: Any) -> Completion:
    completion = output.outputs[0]
    return Completion(
        token_ids=np.asarray(completion.token_ids, dtype=np.int32),
        logprobs=np.asarray(completion.logprobs.logprobs, dtype=np.float32),
        finish_reason=completion.finish_reason,
        versions=tuple(_read_span(span.start, span.version) for span in completion.weight_versions),
        prompt_tokens=len(output.prompt_token_ids),
        cached_tokens=int(output.num_cached_tokens or 0),
    )


def _read_span(start: int, label: str) -> VersionSpan:
    version, _, attempt = label.partition(".")
    return VersionSpan(start=start, version=int(version), attempt=int(attempt))


def _read_scores(output: Any, row: Sequence[int] | Int32Array, tokens: int | None) -> tuple[Int32Array, Float32Array]:
    """Return ids and log-probabilities of the tokens after each prefix, [T-1, K] each."""
    ids = np.empty((len(row) - 1, tokens or 1), dtype=np.int32)
    logprobs = np.empty(ids.shape, dtype=np.float32)
    for place, given in enumerate(output.prompt_logprobs[1:]):
        own = int(row[place + 1])
        # Tokens of equal probability may have equal ranks, so that there is one too many.
        best = [own] if tokens is None else [token for token, score in given.items() if score.rank <= tokens][:tokens]
        ids[place] = best
        logprobs[place] = [given[token].logprob for token in best]
    return ids, logprobs
