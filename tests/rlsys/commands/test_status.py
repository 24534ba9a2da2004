"""`rlsys status` on a narrow terminal and as JSON."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from resumable_runs import config
from rich.console import Console

from rlsys.commands.status import run
from rlsys.config.files import dump_config
from rlsys.errors import EngineError
from rlsys.run.journal import Journal
from rlsys.run.lock import RunLock
from rlsys.run.metrics import MetricsWriter

ROLLOUT = {"time/rollout_s": 3.0, "rollout/idle_policy": 0.1, "rollout/generated_tokens": 100.0}
STEP = {"time/step_s": 4.0, "time/learn_s": 1.0, "learner/tokens": 10.0, "process/actor_restarts": 1.0, **ROLLOUT}


def shown(run_dir: Path, *, as_json: bool = False) -> str:
    output = io.StringIO()
    run(run_dir, Console(file=output, width=80), as_json=as_json)
    return output.getvalue()


def write(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(dump_config(config(warm_start={"max_steps": 10}, train={"max_steps": 9})))
    writer = MetricsWriter(run_dir, -1)
    writer.log("warm_start", 10, 10, {"time/step_s": 1.0})
    writer.log("online", 1, 11, STEP)
    writer.close()


def test_a_running_run_fits_80_columns(tmp_path: Path) -> None:
    write(tmp_path)
    with RunLock(tmp_path), Journal(tmp_path) as journal:
        journal.say("actor 0 \x1b[2J is lost and replaced because its engine process died without a last word")
        journal.beat(
            [{"name": "actor 0", "state": "serving", "calls": 2, "silent_s": 3.0}], {"call": "train", "seconds": 4.0}
        )
        text = shown(tmp_path)
    assert max(map(len, text.splitlines())) <= 80
    joined = " ".join(text.split())
    for expected in (
        "state running: process",
        "15.0 steps/min, 25 generated tokens/s",
        "bottleneck generation: the learner waits for trajectories 75% of the time",
        "failures actor restarts: 1",
        "actor 0 serving, 2 calls under way, 3 s without progress",
        "learner train for 4 s",
        "checkpoint none yet",
        r"\x1b[2J is lost",
    ):
        assert expected in joined, expected


def test_a_damaged_file_is_one_line_beside_the_rest(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "heartbeat.json").write_text("")
    text = " ".join(shown(tmp_path).split())
    assert (
        "state interrupted: steps are missing" in text and "damaged /" in text and "failures actor restarts: 1" in text
    )


def test_a_failed_run_does_not_say_that_it_has_no_failures(tmp_path: Path) -> None:
    write(tmp_path)
    writer = MetricsWriter(tmp_path, 11)
    writer.log("online", 2, 12, {**STEP, "process/actor_restarts": 0.0})
    writer.close()
    with contextlib.suppress(EngineError), RunLock(tmp_path), Journal(tmp_path):
        raise EngineError("75 of 128 verifications failed")
    text = " ".join(shown(tmp_path).split())
    assert "state failed: 75 of 128 verifications failed" in text
    assert "failures none in the recorded steps; state says what ended the run" in text


def test_json_has_the_same(tmp_path: Path) -> None:
    write(tmp_path)
    value = json.loads(shown(tmp_path, as_json=True))
    assert (value["stage"], value["step"], value["counts"]["actor_restarts"]) == ("online", 1, 1)
    assert value["throughput"]["shares"]["wait"] == 0.75
