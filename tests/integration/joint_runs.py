"""Tiny runs of the joint objective: the paper's offline stages, everything online, and PPO with a critic."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from real_runs import STEADY, TINY, TREES, WHOLE, Command, FinishedRun, last_checkpoint, marked, wait_for_row

from rlsys.run.metrics import METRICS, read_rows

# An engine of two sequences grows trees one after the other, so that a kill finds some of them.
OFFLINE: dict[str, Any] = {
    **WHOLE,
    "stages": WHOLE["stages"][:-1],
    "actors": {**TINY["actors"], "max_num_seqs": 2},
    "checkpoint": {"interval": 4, "keep_last": 2},
    "evaluation": {"prompts": 8, "samples": 1},
}


def online(warmed_up: FinishedRun, steps: int, **sections: Any) -> dict[str, Any]:
    """Start from the warm-started policy of another run, with a checkpoint of every step."""
    return {
        **TINY,
        "stages": ["online"],
        "model": {"path": str(warmed_up.dir / "stages" / "warm_start")},
        "sampling": {"max_tokens": 60},
        "checkpoint": {"interval": 1, "keep_last": steps},
        **sections,
        "train": {**TINY["train"], "max_steps": steps, **sections.get("train", {})},
    }


def joint(warmed_up: FinishedRun) -> dict[str, Any]:
    """All terms but the critic's, half of the prompts searched, groups without a signal replaced once."""
    return online(
        warmed_up,
        3,
        search={**TREES, "expansion": "chain", "fraction": 0.5},
        train={"dynamic_sampling_rounds": 1},
        objective={
            "policy": {"tree_estimator": "sibling_mean"},
            "kl": {"weight": 0.01},
            "preference": {"weight": 0.1, "adaptive_smoothing": True},
            "sft": {"weight": 0.1},
            "grad_norm_interval": 1,
        },
    )


def ppo(warmed_up: FinishedRun) -> dict[str, Any]:
    """The critic learns alone in the first step."""
    return online(
        warmed_up,
        4,
        train={"critic_optimizer": {**STEADY}},
        objective={"policy": {"estimator": "gae"}, "value": {"weight": 1.0, "warmup_steps": 1}},
    )


def rows_of(run: Path, stage: str) -> list[dict[str, Any]]:
    """Return the rows of the training steps of a stage, or the only row of a stage without steps."""
    found = [row for row in read_rows(run / "metrics.jsonl") if row["stage"] == stage]
    return found if stage == "search" else [row for row in found if row["step"] > 0]


def check_figures(rows: Sequence[Mapping[str, Any]]) -> None:
    """Assert that all metrics are registered and finite."""
    assert rows
    for row in rows:
        figures = {name: value for name, value in row.items() if name not in ("stage", "step")}
        assert set(figures) <= set(METRICS)
        assert [name for name, value in figures.items() if value is None or not math.isfinite(value)] == [], row


def check_terms(row: Mapping[str, Any], weights: Mapping[str, float]) -> None:
    """Assert that a step has exactly these terms, that they add up to the joint loss, and that empty terms count."""
    assert {name.split("/")[1].removesuffix("_loss") for name in row if name.endswith("_loss")} == set(weights)
    assert {term: row[f"objective/{term}_weight"] for term in weights} == weights
    whole = sum(weight * row[f"objective/{term}_loss"] for term, weight in weights.items())
    assert math.isclose(row["learner/loss"], whole, rel_tol=1e-6, abs_tol=1e-9)
    assert 0 <= row["learner/empty_terms"] < len(weights)
    for term in weights:
        assert 0 <= row[f"objective/{term}_share"] <= 1
        if row[f"objective/{term}_denominator"] == 0:
            assert row[f"objective/{term}_loss"] == 0 and row["learner/empty_terms"] >= 1


def check_gradients(row: Mapping[str, Any], terms: Sequence[str]) -> None:
    """Assert that the first update measured the gradient of every term, and that the shares follow the norms."""
    norms = {term: row[f"objective/{term}_grad_norm"] for term in terms}
    whole = sum(norms.values()) or 1.0
    for term, norm in norms.items():
        assert row[f"objective/{term}_grad_share"] == pytest.approx(norm / whole, rel=1e-9)


def killed_at(start: Callable[..., Command], config: str, run: Path, happened: Callable[[Command], None]) -> None:
    """Kill the driver alone with SIGKILL at a moment of the run."""
    command = start("train", config)
    happened(command)
    command.signal(signal.SIGKILL, group=False)
    command.fail(-signal.SIGKILL)
    deadline = time.monotonic() + 30
    while left := list(marked(command.mark)):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def after_row(run: Path, stage: str, step: int) -> Callable[[Command], None]:
    return lambda command: wait_for_row(command, run, stage, step)


def policy_digest(folder: Path) -> str:
    """Return the sha256 of the weights in the folder of a policy."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def last_contents(run: Path) -> dict[str, str]:
    """sha256 of every file of the last checkpoint, by name; the manifest holds times."""
    folder = last_checkpoint(run)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "MANIFEST.json"
    }
