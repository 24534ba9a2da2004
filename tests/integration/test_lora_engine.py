"""A running vLLM engine takes new versions of an adapter exactly, and mixes none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_architectures import Architecture, build_architecture

from rlsys.config.schema import FromScratchConfig, LoraConfig
from rlsys.models.adapters import adapter_spec
from rlsys.models.tensors import empty_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
HERE = Path(__file__).parent
ROUNDING = 2e-5  # fp32 log-probabilities of two programs that sum in another order; 1e-6 is usual
KINDS: dict[str, dict[str, Any]] = {
    "new": {"rank": 4, "alpha": 8.0},
    # A part of the layers that the engine fuses, of a rank that vLLM rounds up; the first version comes from files.
    "saved": {"rank": 12, "alpha": 6.0, "target_modules": ["q_proj", "v_proj", "self_attn.o_proj", "up_proj"]},
}
PATHS = os.pathsep.join(str(HERE.parents[1] / folder) for folder in ("", "tests/helpers"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    from rlsys.models.scratch import build_from_scratch

    folder = tmp_path_factory.mktemp("engines")
    for kind, lora in KINDS.items():
        size = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, tie_embeddings=kind == "new")
        build_from_scratch(size, ("<answer>", "</answer>"), 0, folder / kind)
        (folder / kind / "lora.json").write_text(json.dumps(lora))
    save_adapter(folder / "saved", LoraConfig(**KINDS["saved"]))
    return run_engines([folder / kind for kind in KINDS])


def run_engines(models: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return what the engines of model folders measured, by the name of the folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    command = [sys.executable, str(HERE / "lora_engine_child.py"), *map(str, models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {model.name: json.loads((model / "measured.json").read_text()) for model in models}


def save_adapter(model: Path, lora: LoraConfig) -> None:
    """Write a random adapter into the folder `adapter` of a model."""
    spec, rng = adapter_spec(empty_model(model), lora, model), np.random.default_rng(0)
    (model / "adapter").mkdir()
    tensors = {name: (rng.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in spec.tensors.items()}
    save_file(tensors, model / "adapter" / "adapter_model.safetensors")
    spec.save_pretrained(model / "adapter")


def test_the_first_version_is_the_base_or_comes_from_files(measured: dict[str, Any]) -> None:
    assert all(values["gap_fresh"] < ROUNDING for values in measured.values())
    assert measured["new"]["gap_to_base"] < ROUNDING
    assert measured["saved"]["gap_to_base"] > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_updated_engine_computes_what_the_learner_computes(measured: dict[str, Any], kind: str) -> None:
    values = measured[kind]
    assert values["gap_before_update"] > 1e-2  # the change is large enough to be noticed
    assert values["gap_updated"] < ROUNDING
    assert values["gap_after_flight"] < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_are_used_again_within_a_version_alone(measured: dict[str, Any], kind: str) -> None:
    # The prompt of 70 tokens was completed with version 0, then twice with version 1.
    values = measured[kind]
    assert values["versions_after"] == [1]
    assert values["cached_tokens"] == [0, 64]
    assert values["gap_same_prompt"] < ROUNDING
    assert values["equal_tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_requests_in_flight_name_both_versions(measured: dict[str, Any], kind: str) -> None:
    values = measured[kind]
    mixed = [spans for spans in values["spans"] if len(spans) == 2]
    assert mixed, values["spans"]
    assert all([version for _, version in spans] == [1, 2] for spans in mixed)
    assert values["gap_first_span"] < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_a_publish_has_the_adapter_alone_and_every_layer_of_it(measured: dict[str, Any], kind: str) -> None:
    values = measured[kind]
    assert sorted(values["names"]) == values["expected"]
    layers = len(values["expected"]) // 2
    assert values["refusal"].endswith(
        f"weight version 3: the engine applies the adapter to {layers - 1} of {layers} layers"
    )


GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
ARCHITECTURES = (
    Architecture(kind="llama", sharded=True),
    Architecture(kind="mistral", changes={"head_dim": 32, "sliding_window": 16}),
    Architecture(kind="qwen3", changes={"head_dim": 32}, padded_vocabulary=True),
    Architecture(kind="gemma2", changes=GEMMA, tied=True),
    Architecture(kind="gemma3_text", changes=GEMMA, tied=True),
    Architecture(kind="phi3", changes={"original_max_position_embeddings": 256}),  # layers that are fused already
)


@pytest.mark.long
def test_other_architectures_take_adapters_of_all_linear_layers(tmp_path: Path) -> None:
    for architecture in ARCHITECTURES:
        build_architecture(architecture, tmp_path / architecture.kind)
        (tmp_path / architecture.kind / "lora.json").write_text(json.dumps({"rank": 4, "alpha": 4.0}))
    for kind, values in run_engines([tmp_path / architecture.kind for architecture in ARCHITECTURES]).items():
        assert values["gap_before_update"] > 1e-3, kind
        assert max(values[name] for name in ("gap_fresh", "gap_updated", "gap_after_flight")) < ROUNDING, kind
