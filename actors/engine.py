"""One vLLM engine, inside this process, stepped by one thread. The only file that imports vllm.

Everything that touches the engine runs on that thread, between two engine steps: requests are added there
and weights are replaced there. So a weight update never meets a half-computed step, and in-flight requests
go on with the new weights; vLLM reports which output tokens each weight version made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from actors.engine_stats import EngineUsage, Meter
from rlsys.config.schema import ActorsConfig
from rlsys.errors import EngineError, RolloutError
from rlsys.types import FinishReason, Float32Array, Int32Array, VersionSpan

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """One completion to draw. seed decides the tokens together with the prompt and the weights.

    It ends with the first end token, the first of stop_token_ids, or the token that completes the first of
    stop_strings in what was drawn; that token belongs to it.
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
    """What the engine drew. logprobs: [T] of the distribution sampled from (after temperature and top_p).

    versions: spans over token_ids (index into the completion, not into prompt plus completion).
    prompt_tokens, cached_tokens: length of the prompt, and how much of it came from the prefix cache.
    """

    token_ids: Int32Array
    logprobs: Float32Array
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0


def engine_environment(config: ActorsConfig, device: str) -> dict[str, str]:
    """Environment variables that must be set before vllm is imported."""
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(config.threads),
        # A subprocess engine would outlive a killed actor; in process there is nothing to orphan.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if config.enforce_eager:
            # One sampler function is compiled even in eager mode: 16 s on first use, no gain for small models.
            variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


class Engine:
    """A running engine. All public methods may be called from any thread.

    Args:
        end_token_ids: tokens that end a completion.
        stop_strings: load the model's tokenizer, so that requests may have stop strings.
    Raises:
        EngineError: from every future, once a step or an update has failed; the engine stays unusable.
    """

    def __init__(
        self,
        model_path: Path,
        config: ActorsConfig,
        device: str,
        end_token_ids: Sequence[int],
        *,
        stop_strings: bool = False,
    ) -> None:
        os.environ.update(engine_environment(config, device))
        self._end_token_ids = list(end_token_ids)
        self._stop_strings = stop_strings
        self._engine = _build(model_path, config, device, stop_strings)
        self._meter = Meter()
        self._tensor_parallel = config.tensor_parallel_size > 1
        self._updates = 0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending: dict[str, _Pending] = {}
        self._requests = 0
        self.steps = 0  # so far
        self.idle = True  # nothing to do, and nothing asked
        self._broken: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        """Add requests in one go, so that the batch does not depend on arrival times.

        Args:
            affinity: which engine of several; this is the only one.
        Raises:
            ValueError: a request has stop strings, and the engine was built without them.
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
        """log p(token t+1 | tokens 0..t) of every row, [T-1] each; computed afresh, never from cached prefixes."""
        futures: list[Future[Float32Array]] = [Future() for _ in rows]

        def add() -> None:
            for row, future in zip(rows, futures, strict=True):
                self._score(row, future)

        self._call(add, lambda error: _fail(futures, error))
        return [future.result() for future in futures]

    def update_weights(self, version: int, attempt: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights between two steps; cached prefixes of older versions are not used again."""

        def apply() -> None:
            try:
                if self._tensor_parallel:
                    self._reload_from_folder(tensors)
                else:
                    self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
            except BaseException as error:
                self._break(error)  # half-loaded: neither the old version nor the new one
                raise
            self._updates += 1
            self._engine.set_weight_version(_label(version, attempt))

        self._ask(apply).result()

    def usage(self) -> EngineUsage:
        """What the engine has done since the last call of this."""
        return self._meter.take()

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join(timeout=10)

    # --- everything below runs on the engine's thread ---

    def _run(self) -> None:
        """Until close. A broken engine stays in the loop, so that every later command learns of it."""
        while self._take_commands(block=not self._pending):
            if self._pending:
                started = time.monotonic()
                try:
                    outputs = self._engine.step()
                    self.steps += 1
                    self._meter.add_step(time.monotonic() - started, len(self._pending))
                    for output in outputs:
                        if output.finished:
                            self._pending[output.request_id].finish(output)
                            del self._pending[output.request_id]
                except BaseException as error:  # noqa: BLE001 - becomes data: every waiting future gets it
                    self._break(error)

    def _break(self, error: BaseException) -> None:
        """Nothing more is asked of the engine: all that wait, and all that will ask, get an EngineError."""
        logger.exception("the engine failed")
        self._broken = EngineError(f"engine failed: {type(error).__name__}: {error}")
        _fail([waiting.future for waiting in self._pending.values()], self._broken)
        self._pending.clear()

    def _reload_from_folder(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Workers of a tensor-parallel engine are processes: they read a folder in shared memory, each its part."""
        from safetensors.torch import save_file

        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - a folder of our own is made below
        with tempfile.TemporaryDirectory(dir=shared, prefix="rl-weights-") as folder:
            # Clones: buckets are read-only views, and tied tensors share memory, which the format refuses.
            whole = {name: tensor.clone() for name, tensor in tensors}
            save_file(whole, os.path.join(folder, "model.safetensors"))
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    def _take_commands(self, block: bool) -> bool:
        """Run waiting commands; wait for one if there is nothing to decode. False means stop."""
        while block or not self._commands.empty():
            self.idle = block
            command = self._commands.get()
            self.idle = False
            if command is None:
                return False
            command()
            block = False
        return True

    def _call(self, function: Callable[[], None], fail: Callable[[BaseException], None]) -> None:
        def command() -> None:
            try:
                if self._broken is not None:
                    raise self._broken
                function()
            except BaseException as error:  # noqa: BLE001 - handed to the caller's future; the thread must live
                fail(error)

        self._commands.put(command)

    def _ask(self, function: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        self._call(lambda: future.set_result(function()), lambda error: _fail([future], error))
        return future

    def _add(self, request: CompletionRequest, future: Future[Completion]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=[*self._end_token_ids, *request.stop_token_ids],
            stop=list(request.stop_strings),
            detokenize=bool(request.stop_strings),
            skip_special_tokens=False,  # a stop string may hold a special token
            include_stop_str_in_output=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._start(request.request_id, request.token_ids, params, _Pending(future, self._completion))

    def _score(self, row: Int32Array, future: Future[Float32Array]) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        self._start("probe", row, params, _Pending(future, lambda output: _read_prompt_logprobs(output, row)))

    def _completion(self, output: Any) -> Completion:
        found = _read_completion(output)
        self._meter.add_completion(len(found.token_ids), found.prompt_tokens, found.cached_tokens)
        return found

    def _start(self, name: str, token_ids: Sequence[int] | Int32Array, params: Any, waiting: _Pending) -> None:
        self._requests += 1
        request_id = str(self._requests)  # ours, so that two requests of one name cannot meet
        try:
            self._engine.add_request(request_id, self._prompt(token_ids), params)
        except ValueError as error:  # too long for max_model_len, for example: this request alone fails
            _fail([waiting.future], RolloutError(f"request {name} was refused: {error}"))
        else:
            self._pending[request_id] = waiting

    def _prompt(self, token_ids: Sequence[int] | Int32Array) -> dict[str, Any]:
        # The salt keeps prefixes that older weights computed out of reach; after a rollback a version comes again.
        return {"prompt_token_ids": [int(token) for token in token_ids], "cache_salt": f"u{self._updates}"}


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request the engine works on, and how its output is read."""

    future: Future[Any]
    read: Callable[[Any], Any]

    def finish(self, output: Any) -> None:
        result = self.read(output)
        with contextlib.suppress(InvalidStateError):  # the event loop may cancel it at any moment
            self.future.set_result(result)


def _fail(futures: Sequence[Future[Any]], error: BaseException) -> None:
    for future in futures:
        with contextlib.suppress(InvalidStateError):  # cancelled, or answered before the rest of its batch
            future.set_exception(error)


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


def _label(version: int, attempt: int) -> str:
    """What vLLM keeps beside every token that it samples."""
    return f"{version}.{attempt}"


def _read_span(start: int, label: str) -> VersionSpan:
    version, _, attempt = label.partition(".")
    return VersionSpan(start=start, version=int(version), attempt=int(attempt))


def _read_prompt_logprobs(output: Any, row: Int32Array) -> Float32Array:
    values = [output.prompt_logprobs[i][int(row[i])].logprob for i in range(1, len(row))]
    return np.asarray(values, dtype=np.float32)


def _build(model_path: Path, config: ActorsConfig, device: str, stop_strings: bool) -> Any:
    from vllm import EngineArgs, LLMEngine

    arguments: dict[str, Any] = {
        "model": str(model_path),
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.dtype],
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(8192, config.max_model_len),
        "block_size": config.block_size,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": not stop_strings,
        "enforce_eager": config.enforce_eager,
        "tensor_parallel_size": config.tensor_parallel_size,
        "disable_log_stats": True,
        "trust_remote_code": False,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "generation_config": "vllm",  # the model folder's own sampling defaults must not leak in
    }
    if device == "cpu":
        # Of a prompt in parts vLLM takes back the first parts' draws, which a seeded generator of the CPU cannot.
        arguments["enable_chunked_prefill"] = False
    if config.tensor_parallel_size == 1:
        arguments["distributed_executor_backend"] = "uni"
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    engine.set_weight_version(_label(0, 0))
    return engine
