"""Publishes to a bf16 engine from a bf16 learner: healthy ones pass for ever, one with a stale layer never does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.schema import FromScratchConfig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
PATHS = os.pathsep.join(str(HERE.parents[1] / folder) for folder in ("", "tests/helpers"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rlsys.models.scratch import build_from_scratch

    folder = tmp_path_factory.mktemp("bf16")
    size = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128)
    build_from_scratch(size, tuple("abcdefghijklmnop"), 0, folder)
    return folder


def measure(model: Path, stale: int) -> dict[str, Any]:
    """Run the publishes of which the last one leaves out a tensor."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    command = [sys.executable, str(HERE / "bf16_child.py"), str(model), str(stale)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def measured(model: Path) -> dict[str, Any]:
    return measure(model, 0)


def test_no_healthy_publish_is_refused(measured: dict[str, Any]) -> None:
    assert measured["refused"] == []
    assert len(measured["gaps"]) == 50
    # A bound of the fp32 kind, or one of single tokens at the measured fresh gap, would have ended the run.
    assert max(measured["gaps"]) > measured["fresh_gap"] > 5e-4


def test_a_stale_layer_is_refused_after_a_step_too_small_for_the_probe(measured: dict[str, Any]) -> None:
    check_refusal(measured)


@pytest.mark.long
def test_a_stale_part_of_a_fused_layer_is_refused(model: Path) -> None:
    check_refusal(measure(model, 1))


def check_refusal(measured: dict[str, Any]) -> None:
    ((tensor, error),) = measured["stale"].items()
    layer = tensor.removesuffix(".weight").replace("k_proj", "qkv_proj")
    assert error.startswith("WeightSyncError: actor 0, weight version 51: layer ")
    assert f"layer {layer} of the engine did not get all its weights" in error
