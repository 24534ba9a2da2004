"""The whole command of `make chaos`, with programs in the place of rlsys."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

JOB = """
import json, os, signal, sys, time
from pathlib import Path
from rlsys.run.checkpoints import CheckpointStore
folder, weights, do = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
folder.mkdir(parents=True, exist_ok=True)
rows = [{"stage": "online", "step": step, "weights/version": step, "time/step_s": 0.5} for step in (0, 1, 2)]
rows[2] |= {"held_out/greedy_accuracy": 0.9, "held_out/sampled_accuracy": 0.8}
line = {"version": 2, "trained": [0, 1, 2], "filtered": [], "skipped": []}
(folder / "ledger.jsonl").write_text(json.dumps(line) + chr(10))
store = CheckpointStore(folder / "checkpoints", 2)
temporary = store.begin("step_000002")
(temporary / "policy").mkdir()
(temporary / "policy" / "model.safetensors").write_text(weights)
(temporary / "state.json").write_text('{"cursor": 4, "in_flight": [3]}')
store.commit(temporary, "step_000002", {"weight_version": 2})
if "litter" in do:
    (folder / "checkpoints" / ".tmp-x").mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))  # now it may be ended
time.sleep(60 if "wait" in do and os.environ["RLSYS_CHAOS_MARK"].endswith(".0") else 0)
"""


@pytest.fixture
def chaos(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the whole command on jobs that a small program makes; its exit code, its page and its result."""
    found = importlib.import_module("chaos")
    monkeypatch.setattr(modules["storm"], "LOOK_S", 0.02)
    monkeypatch.setattr(found.results_page, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(found.results_page, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(found, "WATCHED", ())
    monkeypatch.setattr(found.signal, "signal", lambda *_: None)

    def run(
        weights: str = "same",
        *do: str,
        kind: str = "SIGTERM driver",
        options: tuple[str, ...] = (),
        fails: bool = False,
    ) -> tuple[int, str, dict[str, Any]]:
        def trained(run_dir: Path, config: Path, overrides: list[str], timeout_s: float) -> float:
            assert "run.seed=0" in overrides and "train.max_steps=2" in overrides and timeout_s >= 600
            made.append(run_dir)
            if fails:
                raise subprocess.TimeoutExpired("rlsys", timeout_s)
            subprocess.run([sys.executable, "-c", JOB, str(run_dir), "same"], check=True)
            return 0.25

        class Job(modules["storm"].JobStorm):  # type: ignore[misc]
            def __init__(self, job: int, run_dir: Path, config: Path, overrides: list[str], *rest: Any) -> None:
                super().__init__(job, run_dir, config, overrides, *rest)
                self._command = [sys.executable, "-c", JOB, str(run_dir), weights, *do]

        injections = itertools.repeat(modules["storm_plan"].Injection(kind, 0.05, 0.5))
        monkeypatch.setattr(found, "schedule", lambda *_: injections)
        monkeypatch.setattr(found, "trained", trained)
        monkeypatch.setattr(found, "JobStorm", Job)
        given = ["--minutes", "0.001", "--folder", str(tmp_path / "runs"), "--write", *options, "train.max_steps=2"]
        monkeypatch.setattr(sys, "argv", ["chaos.py", *given])
        made: list[Path] = []
        code = found.main()
        result = json.loads((tmp_path / "results" / "chaos.json").read_text())
        return code, (tmp_path / "results.md").read_text(), result | {"made": made}

    return run


def test_the_command_compares_a_job_with_its_undisturbed_run(chaos: Any) -> None:
    code, page, result = chaos("same", "wait")
    assert code == 0, page
    assert [fault["kind"] for fault in result["faults"]] == ["SIGTERM driver"]
    assert any("the driver ended: exit code 143" in what for _, what in result["timeline"])
    job = result["jobs"][0]
    assert (job["starts"], job["steps"], job["prompts"], job["prompts_lost"], job["step_s"]) == (2, 2, 4, 0, 1.0)
    assert "## The quickstart in a storm of faults" in page and f"sha256 {job['sha256']}" in page
    assert f"Goodput {0.25 / job['seconds']:.3f}" in page and "0.900, 0.900 | 0.800, 0.800 | yes |" in page


def test_undisturbed_runs_are_made_anew_for_every_storm_unless_a_folder_is_named(chaos: Any, tmp_path: Path) -> None:
    storms = [chaos()[2]["made"] for _ in range(2)]
    assert all(made.parent.parent.parent == tmp_path / "runs" for (made,) in storms)
    assert len({made.parent for (made,) in storms}) == 2
    command = importlib.import_module("chaos")
    asked = [*command.OVERRIDES, "train.max_steps=2", "run.seed=0"]
    (tmp_path / "kept" / "seed-0").mkdir(parents=True)
    known = command.record_of(tmp_path / "new", command.CONFIG, asked)
    (tmp_path / "kept" / "seed-0" / "cell.json").write_text(json.dumps(known))  # of the same settings
    _, page, result = chaos(options=("--undisturbed", str(tmp_path / "kept")))
    assert result["made"] == [tmp_path / "kept" / "seed-0"] and f"reused from {tmp_path / 'kept'}" in page


def test_runs_of_other_settings_are_refused_before_the_storm(chaos: Any, tmp_path: Path) -> None:
    other = tmp_path / "kept" / "seed-3"  # of a job that this storm may come to
    other.mkdir(parents=True)
    (other / "cell.json").write_text('{"asked": ["another config"], "seconds": 1.0, "done": true}')
    with pytest.raises(SystemExit, match="seed-3 was made with other settings"):
        chaos(options=("--undisturbed", str(tmp_path / "kept")))
    assert not (tmp_path / "runs").exists()


def test_a_storm_is_not_lost_with_its_undisturbed_run(chaos: Any) -> None:
    code, page, result = chaos("same", "wait", fails=True)
    assert code == 1 and "- **job 0: its undisturbed run failed**" in page and "- **job 0: no verdict" not in page
    assert result["jobs"][0]["accuracy"] == {"greedy": 0.9, "sampled": 0.8}
    kept = json.loads((result["made"][0].parents[1] / "storm.json").read_text())
    assert kept == {"faults": result["faults"], "timeline": result["timeline"]} and len(kept["faults"]) == 1


def test_the_distance_of_the_faults_is_measured(chaos: Any) -> None:
    _, page, result = chaos("same", "wait")
    assert f"1 faults in {result['jobs'][0]['seconds'] / 60:.1f} minutes" in page
    assert f"one every {result['jobs'][0]['seconds']:.0f} s on average" in page
    assert 'ARGS="--seed 0 --minutes 0.001 --mean 35 train.max_steps=2"' in page
    _, page, result = chaos(kind="SIGKILL actor")  # never there
    assert result["faults"] == [] and ": 0 faults in " in page


def test_kinds_that_never_took_effect_are_named(chaos: Any) -> None:
    code, page, _ = chaos("same", "wait")
    assert code == 0 and "**Faults that never took effect: SIGKILL actor, " in page and ", disk full.**" in page
    assert "SIGTERM driver" not in page.partition("Faults that never took effect")[2]


def test_the_command_fails_where_the_bytes_differ_or_something_is_left(chaos: Any) -> None:
    code, page, _ = chaos("other", "litter")
    assert code == 1
    assert "- **job 0: no verdict was lost and no step skipped, but the last checkpoint has other bytes**" in page
    assert "- **left: " in page and "/checkpoints/.tmp-x, 0.0 MiB**" in page
