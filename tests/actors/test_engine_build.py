"""Arguments of a vLLM engine, for devices that this machine lacks too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from actors.engine_build import engine_arguments
from rlsys.config.schema import ActorsConfig

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
