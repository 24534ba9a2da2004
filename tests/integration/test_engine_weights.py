"""A running vLLM engine takes new weights exactly; what it had computed with older ones is not mistaken for new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.weights import expected_tensors
from rlsys.config.schema import FromScratchConfig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
HERE = Path(__file__).parent
ROUNDING = 2e-5  # fp32 log-probabilities of two programs that sum in another order; 1e-6 is usual
KINDS = ("tied", "untied")
PATHS = os.pathsep.join(str(HERE.parents[1] / folder) for folder in ("", "tests/helpers"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from rlsys.models.scratch import build_from_scratch

    folder = tmp_path_factory.mktemp("engines")
    for kind in KINDS:
        size = FromScratchConfig(
            hidden_size=64, layers=2, heads=2, intermediate_size=128, tie_embeddings=kind == "tied"
        )
        build_from_scratch(size, ("<answer>", "</answer>"), 0, folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def measured(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    command = [sys.executable, str(HERE / "engine_child.py"), *map(str, models.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: json.loads((model / "measured.json").read_text()) for kind, model in models.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_updated_engine_computes_what_the_learner_computes(measured, kind: str) -> None:
    found = measured[kind]
    assert found["gap_fresh"] < ROUNDING
    assert found["gap_before_update"] > 1e-2  # the change is large enough to be noticed
    assert found["gap_updated"] < ROUNDING
    assert found["gap_after_flight"] < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_cached_prefix_of_older_weights_is_not_used(measured, kind: str) -> None:
    # The same prompt was completed before the update, so its blocks were in the prefix cache.
    assert measured[kind]["versions_after"] == [1]
    assert measured[kind]["gap_same_prompt"] < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_requests_in_flight_name_both_versions(measured, kind: str) -> None:
    found = measured[kind]
    pairs = list(zip(found["spans"], found["lengths"], strict=True))
    mixed = [(spans, length) for spans, length in pairs if len(spans) == 2]
    assert mixed, found["spans"]
    for spans, length in mixed:
        (first, old), (second, new) = spans
        assert (first, old, new) == (0, 1, 2)
        assert 0 < second < length
    # Requests that ended before the update have one span; none was begun after it.
    assert all(spans == [[0, 1]] for spans, _ in pairs if len(spans) == 1)
    assert found["gap_first_span"] < ROUNDING


def test_an_output_layer_left_out_is_refused_or_beyond_the_tolerance(measured) -> None:
    refusals = {kind: measured[kind]["refusal_without_output_layer"] for kind in KINDS}
    assert any("layer lm_head of the engine did not get all its weights" in refusal for refusal in refusals.values())
    for kind, refusal in refusals.items():
        assert refusal or measured[kind]["gap_without_output_layer"] > 5e-4, kind


@pytest.mark.parametrize("kind", KINDS)
def test_publish_names_every_tensor_of_the_model_and_the_output_layer(measured, models, kind: str) -> None:
    names = measured[kind]["names"]
    assert len(names) == len(set(names))
    assert set(names) == expected_tensors(models[kind]).all
