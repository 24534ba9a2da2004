"""Cells of an experiment: training runs and their evaluations, stored so that none is made twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.files import write_json

RLSYS = Path(sys.executable).parent / "rlsys"


def record_of(run_dir: Path, config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the record of a run; a new record if the run never began.

    Exit if the run was made with another config or other overrides, because its figures would be wrong.
    """
    record = run_dir / "cell.json"
    asked = [hashlib.sha256(config.read_bytes()).hexdigest(), *map(str, overrides)]
    found: dict[str, Any] = {"asked": asked, "seconds": 0.0, "done": False}
    if record.exists():
        found = json.loads(record.read_text())
    if found["asked"] != asked:
        sys.exit(f"{run_dir} was made with other settings; move it away, or choose another folder")
    return found


def trained(run_dir: Path, config: Path, overrides: Sequence[str], timeout_s: float | None = None) -> float:
    """Make or continue a run, unless it is finished. Return the seconds of all its commands.

    Args:
        run_dir: The run directory.
        config: The config file.
        overrides: Overrides of the config.
        timeout_s: Time limit of the command in seconds; None for no limit.
    """
    record, found = run_dir / "cell.json", record_of(run_dir, config, overrides)
    if not found["done"]:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(record, found)
        print(f"== {run_dir}", flush=True)
        started = time.monotonic()
        try:
            arguments = [str(config), f"run.dir={run_dir}", *overrides]
            subprocess.run([RLSYS, "train", *arguments], check=True, timeout=timeout_s)
            found["done"] = True
        finally:
            found["seconds"] += time.monotonic() - started
            write_json(record, found)
    return float(found["seconds"])


def evaluated(policy: Path, config: Path, overrides: Sequence[str], output: Path) -> dict[str, Any]:
    """Return the figures of `rlsys evaluate` for a policy folder. The same weights and settings are evaluated once."""
    weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(policy.glob("*.safetensors"))]
    asked = [*weights, hashlib.sha256(config.read_bytes()).hexdigest(), *map(str, overrides)]
    found = json.loads(output.read_text()) if output.exists() else {}
    if found.get("asked") != asked:
        figures = output.with_name(f"{output.name}.figures")
        command = ["evaluate", str(policy), f"--config={config}", f"--output={figures}", *overrides]
        started = time.monotonic()
        subprocess.run([RLSYS, *command], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        found = {"asked": asked, "figures": json.loads(figures.read_text()), "seconds": seconds}
        figures.unlink()
        shutil.rmtree(f"{figures}.parts")  # the figures are kept below
        write_json(output, found)
    measured: dict[str, Any] = found["figures"]
    return measured


def seconds_of(folder: Path) -> float:
    """Return the seconds of all trainings and evaluations below a folder."""
    records = [*folder.rglob("cell.json"), *folder.rglob("*evaluation.json")]
    return float(sum(json.loads(path.read_text())["seconds"] for path in records))


def metrics(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """Return the metrics of a stage, one row for each step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def tokens_to(goal: float, tokens: np.ndarray, accuracy: np.ndarray) -> float:
    """Return the tokens at which an accuracy is first reached, linear between evaluations; NaN if it never is."""
    above = np.flatnonzero(accuracy >= goal)
    if not len(above):
        return float("nan")
    at = int(above[0])
    return float(np.interp(goal, accuracy[max(0, at - 1) : at + 1], tokens[max(0, at - 1) : at + 1]))
