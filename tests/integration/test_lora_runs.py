"""Runs with an adapter: all stages hand it on, and lost processes, interruptions and transports change no byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_runs import BEGINS, TINY, WARM, WHOLE, Command, commands, digests, faults_in, steady_rows, write_config
from safetensors.numpy import load_file

from rlsys.models.adapters import read_adapter
from rlsys.models.folder import is_adapter
from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
STEPS, RATE = 4, {"learning_rate": 2e-3, "warmup_updates": 0}
ONLINE = BEGINS - WARM  # the weight version with which the stage online begins
LORA = {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"}
ADAPTER_BYTES = 4 * 4 * 2 * (4 * (64 + 64) + 3 * (64 + 128))  # fp32, rank 4, two layers of seven linear ones


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes tagged answers, trained with all its weights."""
    folder = tmp_path_factory.mktemp("base")
    with commands() as start:
        start("train", write_config(folder, {**TINY, "stages": ["warm_start"]})).finish()
    return folder / "run" / "stages" / "warm_start"


def config(folder: Path, base: Path, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    lora = {**LORA, "merge": changes.pop("merge", False)}
    values = {
        **WHOLE,
        "stages": ["search", "sft", "preference", "online"],
        "model": {"path": str(base), "lora": lora},
        "train": {**TINY["train"], "max_steps": STEPS, "optimizer": RATE},
        "weight_sync": {"bucket_mib": 0.01, "timeout_s": 60},  # several buckets in every publish
        "checkpoint": {"interval": 2, "keep_last": 9},
        **changes,
    }
    return write_config(folder, values)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with commands() as start:
        start("train", config(folder, base)).finish()
    return folder / "run"


def adapter(folder: Path) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def test_every_stage_goes_on_with_the_adapter_of_the_stage_before(undisturbed: Path, base: Path) -> None:
    stages = [undisturbed / "stages" / name for name in ("sft", "preference", "online")]
    assert all(is_adapter(folder) and read_adapter(folder)[0] == base for folder in stages)
    sizes = [float(np.abs(np.subtract(*map(adapter, pair))).max()) for pair in pairwise(stages)]
    assert all(0 < size < 0.1 for size in sizes)  # a new adapter would differ by the size of its factors
    rows = [row for row in read_rows(undisturbed / "metrics.jsonl") if "weights/publish_bytes" in row]
    assert {row["weights/publish_bytes"] for row in rows} == {ADAPTER_BYTES}
    assert max(row["weights/probe_gap_max"] for row in rows) < 1e-4
    online = [row for row in rows if row["stage"] == "online"]
    assert len(online) == STEPS and all(row["learner/grad_norm"] > 0 for row in online)


def test_lost_processes_change_nothing(
    start: Callable[..., Command], undisturbed: Path, base: Path, tmp_path: Path
) -> None:
    faults = (
        f"publish.bucket@role=actor,number=1,attempt=0,version={ONLINE + 1},hit=3:kill9",
        f"learner.step@role=learner,number=1,attempt=0,version={ONLINE + 4}:kill9",
    )
    log = tmp_path / "faults.jsonl"
    environment = {"RLSYS_FAULTS": ";".join(faults), "RLSYS_FAULTS_LOG": str(log)}
    command = start("train", config(tmp_path, base), environment=environment).finish()
    command.assert_gone(within_s=5)
    assert len(faults_in(log)) == 2
    command.said("actor 1 is lost and replaced")
    command.said("the learner is lost and started again")
    assert digests(tmp_path / "run") == digests(undisturbed)
    assert steady_rows(tmp_path / "run") == steady_rows(undisturbed)


def test_a_broadcast_and_other_partitions_and_a_merged_export(
    start: Callable[..., Command], undisturbed: Path, base: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "merge": True,
        "weight_sync": {"transport": "collective", "bucket_mib": 0.01, "timeout_s": 60},
        "learner": {"ranks": 2, "zero_stage": 3},
        "placement": "spread",
    }
    path = config(tmp_path, base, **changes)
    start("train", path, "train.max_steps=2").finish()
    # Raising train.max_steps continues from the adapter in the checkpoint, not from the merged export.
    start("train", path).finish()
    run = tmp_path / "run"
    online, sft = run / "stages" / "online", run / "stages" / "sft"
    assert is_adapter(sft) and not is_adapter(online)
    assert json.loads((online / "config.json").read_text())["model_type"] == "qwen2"
    last = sorted((run / "checkpoints").glob("step_*"))[-1] / "policy"
    found, expected = adapter(last), adapter(undisturbed / "stages" / "online")
    assert float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) < 1e-2  # ZeRO 3 sums in another order
    before, after = load_file(base / "model.safetensors"), load_file(online / "model.safetensors")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == {name for name in before if name.endswith("_proj.weight")}
    for target in (str(run), str(online)):
        command = start("evaluate", target).finish()
        assert "greedy accuracy" in command.stdout
