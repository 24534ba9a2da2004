"""Settings and arguments of a vLLM engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

from actors.weights import RELOAD_LOGGER, is_about_weights
from rlsys.config.checks import BATCH_TOKENS
from rlsys.config.schema import ActorsConfig
from rlsys.models.adapters import AdapterSpec
from rlsys.processes import openmp_environment

ADAPTER_ID = 1
"""Number by which vLLM knows the one adapter of an engine."""


def engine_environment(config: ActorsConfig, device: str) -> dict[str, str]:
    """Return the environment variables that must be set before vllm is imported."""
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **openmp_environment(config.threads),
        # An engine in a subprocess would outlive a killed actor.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if config.enforce_eager:
            # vLLM compiles a sampler function even in eager mode: 16 s at the first use, without gain for small models.
            variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def build_engine(
    model_path: Path,
    config: ActorsConfig,
    device: str,
    *,
    stop_strings: bool,
    sleeps: bool = False,
    spec: AdapterSpec | None = None,
) -> Any:
    """Build a vLLM engine that serves a model in this process.

    Args:
        model_path: model folder.
        config: section `actors`.
        device: "cpu" or "cuda".
        stop_strings: whether to load the tokenizer of the model.
        sleeps: whether the engine shares its device and must be able to sleep.
        spec: shape of the adapter that the engine serves; None for an engine without adapters.
    """
    from vllm import EngineArgs, LLMEngine

    logging.getLogger(RELOAD_LOGGER).addFilter(is_about_weights)
    arguments = engine_arguments(model_path, config, device, stop_strings)
    if sleeps and device == "cuda":
        arguments["enable_sleep_mode"] = True
    if spec is not None:
        arguments |= adapter_arguments(spec)
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    engine.set_weight_version(weight_label(0, 0))
    return engine


def engine_arguments(model_path: Path, config: ActorsConfig, device: str, stop_strings: bool) -> dict[str, Any]:
    """Return vLLM's arguments of an engine; see `build_engine`."""
    arguments: dict[str, Any] = {
        "model": str(model_path),
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.dtype],
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(BATCH_TOKENS, config.max_model_len),
        "block_size": config.block_size,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,  # a teacher gives as many as the config asks for
        "skip_tokenizer_init": not stop_strings,
        "enforce_eager": config.enforce_eager,
        "tensor_parallel_size": config.tensor_parallel_size,
        "disable_log_stats": True,
        "trust_remote_code": False,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        # With batches in flight, tokens of the old weights would get the label of the new ones.
        "async_scheduling": False,
        # In this process; with tensor parallelism, in children of it. By default, vLLM would place them with Ray.
        "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        "generation_config": "vllm",  # ignore the sampling defaults of the model folder
        "weight_transfer_config": {"backend": "rlsys"},
        "worker_extension_cls": "actors.weight_transfer.WorkerExtension",
    }
    if device == "cpu":
        # vLLM samples after every chunk of a prompt and then rewinds the generator; a seeded CPU generator cannot.
        arguments["enable_chunked_prefill"] = False
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    return arguments


def adapter_arguments(spec: AdapterSpec) -> dict[str, Any]:
    """Return vLLM's arguments of an engine that serves one adapter."""
    from vllm.config.lora import MaxLoRARanks

    return {
        "enable_lora": True,
        "max_lora_rank": min(size for size in get_args(MaxLoRARanks) if size >= spec.lora.rank),
        "max_loras": 1,
        "max_cpu_loras": 1,
        # Otherwise vLLM also prepares the output layer of some models, and then fails at log-probabilities of prompts.
        "lora_target_modules": sorted({layer.rpartition(".")[2] for layer in spec.layers}),
    }


def adapter_request() -> Any:
    """Return vLLM's name of the one adapter of an engine.

    Requests for completions must all have the same one, because it is part of the key of the prefix cache. vLLM does
    not read its folder, because an adapter of this number is there already.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", ADAPTER_ID, "policy")


def weight_label(version: int, attempt: int) -> str:
    """Return the label that vLLM attaches to every token that it samples."""
    return f"{version}.{attempt}"
