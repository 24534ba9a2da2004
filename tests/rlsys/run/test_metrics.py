"""metrics.jsonl and TensorBoard carry the same names and values, also after a resume."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlsys.errors import RlsysError
from rlsys.run.metrics import METRICS, MetricsWriter, read_rows


def events(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every tag, as TensorBoard reads them."""
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def rows_as_events(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the events that a metrics.jsonl should have. TensorBoard stores float32."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(run_dir / "metrics.jsonl"):
        for name in METRICS:
            if row.get(name) is not None:
                expected.setdefault(name, []).append((row["weights/version"], float(np.float32(row[name]))))
    return expected


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def run(run_dir: Path, first: int, last: int, resume_version: int = 0) -> MetricsWriter:
    """Log versions first..last of a run whose stage `warm` has 3 steps and whose stage `online` follows."""
    writer = MetricsWriter(run_dir, resume_version)
    for version in range(first, last + 1):
        stage, step = ("warm", version) if version <= 3 else ("online", version - 3)
        writer.log(stage, step, version, {"rollout/reward": version / 7, "learner/updates": 4})
        if version == 3:
            writer.log("online", 0, 3, {"held_out/greedy_accuracy": 0.25})
    return writer


def test_registry() -> None:
    assert all(name == spec.name and re.fullmatch(r"[a-z_]+/[a-z_]+", name) for name, spec in METRICS.items())
    assert all(spec.unit and spec.meaning for spec in METRICS.values())
    # Only times, rates, memory and figures that depend on the order of requests may differ between equal runs.
    volatile = ("time/", "process/", "rollout/idle_", "rollout/prefix_cache_")
    machine = [name for name in METRICS if name.startswith(volatile) or name.endswith("_s")]
    assert [name for name, spec in METRICS.items() if spec.volatile] == machine


def test_row_is_in_the_order_of_the_registry(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.log("online", 3, 7, {"time/step_s": 0.1, "rollout/reward": np.float32(0.5), "learner/updates": 4})
    writer.close()
    assert lines(tmp_path) == [
        '{"stage": "online", "step": 3, "weights/version": 7, "rollout/reward": 0.5, '
        '"learner/updates": 4, "time/step_s": 0.1}'
    ]


def test_a_row_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.log("online", 1, 1, {"rollout/reward": 0.5})
    assert len(lines(tmp_path)) == 1
    assert events(tmp_path)["rollout/reward"] == [(1, 0.5)]
    writer.close()


def test_unknown_name_and_second_row_are_errors(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    with pytest.raises(RlsysError, match="rollout/rewards"):
        writer.log("online", 1, 1, {"rollout/rewards": 0.5})
    writer.log("online", 1, 1, {})
    writer.log("warm", 1, 1, {})
    with pytest.raises(RlsysError, match="stage online, step 1"):
        writer.log("online", 1, 1, {})
    writer.close()
    assert len(lines(tmp_path)) == 2


@settings(max_examples=40, deadline=None)
@given(value=st.floats())
def test_numbers_survive_and_non_finite_is_null(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    folder = tmp_path_factory.mktemp("run")
    writer = MetricsWriter(folder, 0)
    writer.log("online", 1, 1, {"learner/loss": value})
    writer.close()

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(lines(folder)[0], parse_constant=refuse)
    assert row["learner/loss"] == (value if math.isfinite(value) else None)
    assert ("learner/loss" in events(folder)) == math.isfinite(value)


def test_tensorboard_equals_jsonl(tmp_path: Path) -> None:
    run(tmp_path, 1, 6).close()
    assert events(tmp_path) == rows_as_events(tmp_path)
    assert len(events(tmp_path)["rollout/reward"]) == 6


@pytest.mark.parametrize("checkpoint", range(7))
@pytest.mark.parametrize("killed_after", [3, 6])
def test_resumed_files_equal_uninterrupted_ones(tmp_path: Path, checkpoint: int, killed_after: int) -> None:
    """A run that is killed in the middle of a line and resumed from a checkpoint has the same rows and events."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(whole, 1, 8).close()

    checkpoint = min(checkpoint, killed_after)
    run(resumed, 1, killed_after).close()
    with (resumed / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "online", "st')
    run(resumed, checkpoint + 1, 8, checkpoint).close()

    assert lines(resumed) == lines(whole)
    assert events(resumed) == events(whole) == rows_as_events(whole)


def test_the_row_at_the_checkpoint_may_be_written_again(tmp_path: Path) -> None:
    """The row of step 0 has the version of the checkpoint that ended the previous stage, and is written after it."""
    run(tmp_path, 1, 3).close()
    before = lines(tmp_path)
    writer = MetricsWriter(tmp_path, 3)
    writer.log("online", 0, 3, {"held_out/greedy_accuracy": 0.25})
    assert lines(tmp_path) == before
    assert events(tmp_path) == rows_as_events(tmp_path)
    with pytest.raises(RlsysError, match="step 0"):
        writer.log("online", 0, 3, {})
    with pytest.raises(RlsysError, match="step 2"):
        writer.log("warm", 2, 2, {})
    writer.close()


def test_event_file_cut_short_by_a_kill(tmp_path: Path) -> None:
    run(tmp_path, 1, 6).close()
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.write_bytes(first.read_bytes()[:-3])
    run(tmp_path, 6, 8, resume_version=5).close()
    assert events(tmp_path) == rows_as_events(tmp_path)


def test_a_line_that_is_not_a_row_is_named(tmp_path: Path) -> None:
    run(tmp_path, 1, 2).close()
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace('"step": 2', '"stop": 2'))
    with pytest.raises(RlsysError, match=r"metrics\.jsonl:2: expected a row with stage, step"):
        MetricsWriter(tmp_path, 2)


@pytest.mark.heavy
def test_writing_does_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlsys.run.metrics import MetricsWriter\n"
        "MetricsWriter(Path(sys.argv[1]), 0).close()\n"
        "assert not {'torch', 'tensorflow', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
