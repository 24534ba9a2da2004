"""A run with search, the joint objective and a critic; the moments at which its driver is killed; its beginnings."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_runs import STEADY, TINY, TREES, FinishedRun

from rlsys.run.metrics import read_rows

STEPS, INTERVAL, KEPT, SEED = 12, 2, 2, 36
PHASES = ("start-up", "rollout", "search", "backward", "optimizer", "publish", "checkpoint")


def killed_config(warmed_up: FinishedRun) -> dict[str, Any]:
    """Start from the warm-started policy of another run. Small buckets give a publish several of them."""
    return {
        **TINY,
        "stages": ["online"],
        "model": {"path": str(warmed_up.dir / "stages" / "warm_start")},
        "actors": {**TINY["actors"], "count": 1},
        "sampling": {"max_tokens": 60},
        "search": {**TREES, "expansion": "chain", "fraction": 0.5},
        "train": {
            **TINY["train"],
            "max_steps": STEPS,
            "groups_per_step": 4,
            "dynamic_sampling_rounds": 1,
            "critic_optimizer": {**STEADY},
        },
        "objective": {
            "policy": {"estimator": "gae", "tree_estimator": "sibling_mean"},
            "kl": {"weight": 0.01},
            "value": {"weight": 0.5},
            "preference": {"weight": 0.1, "adaptive_smoothing": True},
            "sft": {"weight": 0.1},
            "grad_norm_interval": 4,
        },
        "weight_sync": {"bucket_mib": 0.1},
        "checkpoint": {"interval": INTERVAL, "keep_last": KEPT},
        "evaluation": {"prompts": 8, "samples": 1},
    }


@dataclass(frozen=True, slots=True)
class Moment:
    """When the driver is killed.

    begins: version of the checkpoint that the killed run continues from, 0 for a run from scratch.
    fault: of RLSYS_FAULTS; empty where the kill comes `after_s` seconds after the start of the command.
    """

    phase: str
    begins: int
    fault: str = ""
    after_s: float = 0.0

    @property
    def point(self) -> str:
        return self.fault.partition("@")[0].partition(":")[0]

    @property
    def name(self) -> str:
        how = self.fault.replace("role=", "") if self.fault else f"{self.after_s:.1f} s"
        return f"{self.phase}-from-{self.begins}-{how}"


def moments() -> list[Moment]:
    """Return thirty moments. Versions, hits and ranks are drawn from SEED."""
    rng = random.Random(SEED)

    def before(version: int) -> int:
        return (version - 1) // INTERVAL * INTERVAL

    def at(phase: str, fault: str, scratch: bool = False) -> Moment:
        """Return a moment in the step that makes a drawn version, triggered by the process in that phase."""
        version = rng.randint(1, 4) if scratch else rng.randint(3, STEPS)
        drawn = {"version": version, "hit": rng.randint(1, 3), "rank": rng.randrange(2)}
        return Moment(phase, 0 if scratch else before(version), fault.format(**drawn))

    def saving(fault: str, scratch: bool = False) -> Moment:
        """Return a moment while the checkpoint of a drawn version is written."""
        version = INTERVAL * (1 if scratch else rng.randint(2, STEPS // INTERVAL))
        return Moment("checkpoint", before(version), fault.format(version=version, rank=rng.randrange(2)))

    rank = "role=learner,number={rank},version={version}"
    return [
        Moment("start-up", 0, "driver.start:kill9"),
        Moment("start-up", 0, "driver.up:kill9"),
        Moment("start-up", 0, after_s=rng.uniform(2, 9)),
        Moment("start-up", before(rng.randint(3, STEPS)), "driver.up:kill9"),
        Moment("start-up", before(rng.randint(3, STEPS)), after_s=rng.uniform(2, 9)),
        at("rollout", "driver.rollout@step={version}:kill9", scratch=True),
        at("rollout", "driver.rollout@step={version}:kill9"),
        at("rollout", "generate@role=actor,hit={hit}:kill_driver"),
        at("rollout", "generate@role=actor,hit={hit}:kill_driver"),
        at("search", "search@role=actor,hit={hit}:kill_driver", scratch=True),
        at("search", "search@role=actor,hit={hit}:kill_driver"),
        at("search", "search@role=actor,hit={hit}:kill_driver"),
        at("search", "search@role=actor,hit={hit}:kill_driver"),
        at("backward", f"learner.backward@{rank},hit={{hit}}:kill_driver", scratch=True),
        at("backward", f"learner.backward@{rank},hit={{hit}}:kill_driver"),
        at("backward", f"learner.backward@{rank},hit={{hit}}:kill_driver"),
        at("backward", f"learner.backward@{rank},hit={{hit}}:kill_driver"),
        at("optimizer", f"learner.optimizer@{rank},hit={{hit}}:kill_driver"),
        at("optimizer", f"learner.optimizer@{rank},hit={{hit}}:kill_driver"),
        at("optimizer", f"learner.optimizer@{rank},hit={{hit}}:kill_driver"),
        at("publish", "driver.publish@version={version}:kill9"),
        at("publish", "publish.bucket@role=actor,version={version},hit={hit}:kill_driver", scratch=True),
        at("publish", "publish.bucket@role=actor,version={version},hit={hit}:kill_driver"),
        saving("checkpoint.learner@role=learner,number={rank},file=policy:kill_driver"),
        saving("checkpoint.learner@role=learner,number={rank},file=learner:kill_driver"),
        saving("checkpoint.learner@role=learner,number={rank},file=critic:kill_driver", scratch=True),
        saving("checkpoint.seal@version={version}:kill9"),
        saving("checkpoint.rename@version={version}:kill9"),
        saving("checkpoint.visible@version={version}:kill9"),
        saving("checkpoint.prune@version={version}:kill9"),
    ]


def check_moments(found: list[Moment]) -> None:
    """Test that there are thirty, at least two in each phase, and at least five in runs from scratch."""
    phases = Counter(moment.phase for moment in found)
    assert len(found) == len({moment.name for moment in found}) == 30
    assert set(phases) == set(PHASES) and min(phases.values()) >= 2
    assert sum(moment.begins == 0 for moment in found) >= 5
    assert all(moment.begins % INTERVAL == 0 for moment in found)


def copy_beginning(undisturbed: Path, run: Path, version: int) -> None:
    """Restore the run directory of the undisturbed run to its state after the checkpoint of a version."""
    if version == 0:
        return
    run.mkdir(parents=True)
    shutil.copy(undisturbed / "config.yaml", run)
    for made in range(version - (KEPT - 1) * INTERVAL, version + 1, INTERVAL):
        if made > 0:
            name = f"step_{made:06d}"
            shutil.copytree(undisturbed / "checkpoints" / name, run / "checkpoints" / name)
    for name, key in (("metrics.jsonl", "weights/version"), ("ledger.jsonl", "version")):
        lines = (undisturbed / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(line for line in lines if json.loads(line)[key] <= version))


def trained_anew(run: Path, version: int) -> Callable[[], bool]:
    """Return a function: whether metrics.jsonl was rewritten since now and has a step after a version."""
    path = run / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0

    def found() -> bool:
        if not path.exists() or path.stat().st_mtime_ns == before:
            return False
        rows = read_rows(path)
        return bool(rows) and rows[-1]["step"] > 0 and rows[-1]["weights/version"] > version

    return found
