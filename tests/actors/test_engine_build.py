"""Arguments of a vLLM engine, for devices that this machine lacks too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from actors.engine_build import adapter_arguments, engine_arguments
from rlsys.config.schema import ActorsConfig, LoraConfig
from rlsys.models.adapters import AdapterSpec

CPU, CUDA = "cpu", "cuda"


def arguments(device: str, **fields: Any) -> dict[str, Any]:
    return engine_arguments(Path("model"), ActorsConfig(**fields), device, stop_strings=False)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_no_batch_is_in_flight_while_weights_change(device: str) -> None:
    assert arguments(device)["async_scheduling"] is False


def test_parallel_engines_do_not_ask_ray_for_bundles() -> None:
    assert arguments(CUDA)["distributed_executor_backend"] == "uni"
    parallel = arguments(CUDA, tensor_parallel_size=2)
    assert (parallel["distributed_executor_backend"], parallel["tensor_parallel_size"]) == ("mp", 2)


def test_an_engine_on_a_gpu_says_how_much_of_it_must_be_free() -> None:
    assert arguments(CUDA, gpu_memory_utilization=0.4)["gpu_memory_utilization"] == 0.4
    assert "gpu_memory_utilization" not in arguments(CPU)


def test_vllm_knows_every_argument() -> None:
    from vllm import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert arguments(CPU).keys() | arguments(CUDA).keys() <= known
    spec = AdapterSpec(lora=LoraConfig(), base=Path("model"), layers={"model.layers.0.q_proj": (2, 2)})
    assert adapter_arguments(spec).keys() <= known


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (2, 8), (16, 16), (17, 32), (500, 512), (512, 512)])
def test_vllm_gets_the_next_rank_that_it_serves_and_the_adapted_layers(rank: int, expected: int) -> None:
    layers = {f"model.layers.{number}.{name}": (2, 2) for number in (0, 1) for name in ("mlp.up_proj", "attn.q_proj")}
    spec = AdapterSpec(lora=LoraConfig(rank=rank), base=Path("model"), layers=layers)
    found = adapter_arguments(spec)
    assert found["max_lora_rank"] == expected
    assert found["lora_target_modules"] == ["q_proj", "up_proj"]
