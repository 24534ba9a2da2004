"""A run that broadcasts its weights ends with the bytes of one that uses the object store, also if an actor dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import TINY, Command, digests, faults_in, steady_rows, write_config

from rlsys.run.metrics import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
STEPS = 4
SHORT: dict[str, Any] = {
    **TINY,
    "warm_start": {**TINY["warm_start"], "max_steps": 20},
    "train": {**TINY["train"], "max_steps": STEPS},
}
BUCKETS = {"bucket_mib": 0.02, "timeout_s": 60}  # several buckets in every publish


def config(folder: Path, transport: str) -> str:
    folder.mkdir()
    return write_config(folder, {**SHORT, "weight_sync": {"transport": transport, **BUCKETS}})


def test_an_actor_killed_in_a_broadcast_changes_nothing(start: Callable[..., Command], tmp_path: Path) -> None:
    start("train", config(tmp_path / "store", "object_store")).finish()
    log = tmp_path / "faults.jsonl"
    # The first publish is version 20; in the second one, actor 1 dies after its second bucket.
    fault = "publish.bucket@role=actor,number=1,attempt=0,version=21,hit=2:kill9"
    environment = {"RLSYS_FAULTS": fault, "RLSYS_FAULTS_LOG": str(log)}
    command = start("train", config(tmp_path / "broadcast", "collective"), environment=environment).finish()
    command.assert_gone(within_s=5)
    assert len(faults_in(log)) == 1
    command.said("actor 1 is lost and replaced")
    stored, broadcast = tmp_path / "store" / "run", tmp_path / "broadcast" / "run"
    assert digests(broadcast) == digests(stored)
    assert steady_rows(broadcast) == steady_rows(stored)
    rows = read_rows(broadcast / "metrics.jsonl")
    publishes = [row["weights/publish_s"] for row in rows if "weights/publish_s" in row]
    assert len(publishes) >= STEPS and max(publishes) < BUCKETS["timeout_s"] / 2
    # The other actor was a member of the broadcast, and noticed at once.
    assert (
        "the broadcast of weights failed, the object store takes over"
        in (broadcast / "logs" / "actor-0.log").read_text()
    )
