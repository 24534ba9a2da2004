"""DeepSpeed ranks in plain processes: partitioning, saving and resuming do not change what is learned."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlsys.config import FromScratchConfig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ZERO_STAGES = (0, 1, 2, 3)


def run_ranks(folder: Path, name: str, ranks: int, jobs: list[dict[str, Any]]) -> None:
    """Run jobs on so many ranks; every rank must end well."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "learner_child.py"), str(rank), str(ranks), str(path)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at every ZeRO stage with two ranks, undisturbed and with a save and a resume in the middle.

    One rank at ZeRO 0 continues the half-way checkpoint of two ranks at ZeRO 2, and makes all steps alone.
    """
    from rlsys.models import build_from_scratch

    folder = tmp_path_factory.mktemp("ranks")
    model = str(folder / "model")
    # Tied embeddings, and vocabulary enough for token ids below 60.
    size = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_positions=64)
    build_from_scratch(size, ("<answer>", "</answer>"), 0, folder / "model")

    def jobs(name: str, **learner: Any) -> list[dict[str, Any]]:
        common = {"model": model, "learner": learner}
        return [
            {**common, "first": 0, "last": 4, "save": f"{folder}/{name}-whole"},
            {**common, "first": 0, "last": 2, "save": f"{folder}/{name}-half"},
            {**common, "first": 2, "last": 4, "resume": f"{folder}/{name}-half", "save": f"{folder}/{name}-resumed"},
        ]

    two = [job for stage in ZERO_STAGES for job in jobs(f"zero{stage}", zero_stage=stage)]
    two += jobs("bf16", zero_stage=2, dtype="bf16")
    run_ranks(folder, "two", 2, two)
    one = {"model": model, "learner": {"zero_stage": 0}, "last": 4}
    run_ranks(
        folder,
        "one",
        1,
        [
            {**one, "first": 2, "resume": f"{folder}/zero2-half", "save": f"{folder}/one-resumed"},
            {**one, "first": 0, "save": f"{folder}/one-whole"},
        ],
    )
    return folder


def change(folder: Path, name: str) -> np.ndarray:
    """All parameters of a result minus those of the initial model, as one vector."""
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / name / "policy" / "model.safetensors")
    assert set(after) == set(before)
    return np.concatenate([(after[key].astype(np.float64) - before[key]).ravel() for key in sorted(before)])


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, of vectors."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def digests(checkpoint: Path) -> dict[str, str]:
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*"))
        if path.suffix in (".safetensors", ".json")
    }


@pytest.mark.parametrize("name", [*(f"zero{stage}" for stage in ZERO_STAGES), "bf16"])
def test_resumed_equals_undisturbed_byte_for_byte(folder: Path, name: str) -> None:
    found, expected = digests(folder / f"{name}-resumed"), digests(folder / f"{name}-whole")
    assert {"policy/model.safetensors", "learner/exp_avg.safetensors", "figures.json"} <= set(expected)
    assert found == expected
    assert digests(folder / f"{name}-half")["policy/model.safetensors"] != expected["policy/model.safetensors"]


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_every_zero_stage_makes_the_same_update(folder: Path, stage: int) -> None:
    # fp32 sums of other orders differ by about 1e-7 each; Adam divides tiny gradients by their own size.
    assert relative(change(folder, f"zero{stage}-whole"), change(folder, "one-whole")) < 2e-5
    figures, expected = (
        json.loads((folder / f"{n}-whole" / "figures.json").read_text()) for n in (f"zero{stage}", "one")
    )
    for name in ("supervised/loss", "learner/loss", "learner/kl", "learner/grad_norm", "learner/entropy"):
        assert figures[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-8), name


def test_two_ranks_at_zero_2_continue_as_one_at_zero_0(folder: Path) -> None:
    assert relative(change(folder, "one-resumed"), change(folder, "zero2-whole")) < 2e-5
    for key in ("exp_avg", "exp_avg_sq"):
        found, expected = (
            load_file(folder / n / "learner" / f"{key}.safetensors") for n in ("one-resumed", "zero2-whole")
        )
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert relative(found[name].ravel(), value.ravel()) < 2e-5, name
    # Six updates: a supervised step makes one, an online step two.
    assert json.loads((folder / "one-resumed" / "learner" / "learner.json").read_text())["updates"] == 6


def test_bf16_keeps_fp32_masters_and_stays_near_fp32(folder: Path) -> None:
    masters = load_file(folder / "bf16-whole" / "learner" / "master.safetensors")
    assert {value.dtype for value in masters.values()} == {np.dtype(np.float32)}
    before = load_file(folder / "model" / "model.safetensors")
    found = np.concatenate([(masters[key] - before[key]).ravel() for key in sorted(before)])
    expected = change(folder, "zero2-whole")
    # bf16 has 8 bits of mantissa: the updates point the same way, they are not equal.
    assert found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected)) > 0.99
