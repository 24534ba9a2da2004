"""A learner that resumes without its moments, or without its count of updates, does not go on as before.

So the comparison of test_learner_ranks.py, resumed against undisturbed byte for byte, can fail. With the whole stack,
and for what else a checkpoint holds: test_exact_resume.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_learner_ranks import build_models, digests, resumed, run_ranks, whole

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(300)]


def zero(folder: Path, name: str) -> None:
    path = folder / "learner" / f"{name}.safetensors"
    tensors = load_file(path)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for tensor in tensors.values())
    save_file({key: np.zeros_like(tensor) for key, tensor in tensors.items()}, path, {"format": "pt"})


def forget_updates(folder: Path) -> None:
    path = folder / "learner" / "learner.json"
    counters = json.loads(path.read_text())
    assert counters["updates"] == 2
    path.write_text(json.dumps({**counters, "updates": 0}))


WITHOUT: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "exp_avg": lambda folder: zero(folder, "exp_avg"),
    "exp_avg_sq": lambda folder: zero(folder, "exp_avg_sq"),
    "updates": forget_updates,
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank: undisturbed, then from half-way, each time without one part of what was saved."""
    folder = tmp_path_factory.mktemp("controls")
    build_models(folder)
    first = whole(folder, "plain", zero_stage=0)
    run_ranks(folder, {"undisturbed": (1, [first])})
    jobs = []
    for name, remove in WITHOUT.items():
        shutil.copytree(folder / "plain-half", folder / f"{name}-half")
        remove(folder / f"{name}-half")
        jobs.append(resumed(folder, name, name, zero_stage=0))
    run_ranks(folder, {"resumed": (1, jobs)})
    return folder


def test_with_everything_it_is_the_same(ends: Path) -> None:
    assert digests(ends / "nothing-resumed") == digests(ends / "plain-whole")


@pytest.mark.parametrize("name", sorted(set(WITHOUT) - {"nothing"}))
def test_without_a_part_the_comparison_fails(ends: Path, name: str) -> None:
    found, expected = digests(ends / f"{name}-resumed"), digests(ends / "plain-whole")
    different = {file for file in expected if found[file] != expected[file]}
    assert "policy/model.safetensors" in different
    assert f"learner/{name}.safetensors" in different or name == "updates"
    assert ("learner/learner.json" in different) == (name == "updates")
