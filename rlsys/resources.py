"""What a run needs of the machine it starts on: threads of each phase, and memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlsys.config import Config
from rlsys.errors import ConfigError

GIB = 2**30
# Resident memory of a process that has imported its frameworks and holds no model (measured).
ACTOR_BASE_GIB = 1.2
RANK_BASE_GIB = 0.8
STORE_GIB = 0.5
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Need:
    """One line of the plan. field: what to change in the config."""

    phase: str
    what: str
    amount: float
    available: float
    field: str

    @property
    def fits(self) -> bool:
        return self.amount <= self.available


def plan(config: Config, model: Path) -> list[Need]:
    """Threads and memory of every phase against this machine. Rollout and learning alternate on CPUs."""
    cores = float(len(os.sched_getaffinity(0)))
    memory = psutil.virtual_memory().total / GIB
    actors, learner = config.actors, config.learner
    parameters = parameter_count(model)
    actor_gib = ACTOR_BASE_GIB + actors.kv_cache_gib + parameters * BYTES[actors.dtype] / GIB
    state = 8 + (0 if learner.dtype == "fp32" else 4)  # two moments, and master weights beside bf16
    sharded = state / (learner.ranks if learner.zero_stage >= 1 else 1)
    rank_gib = RANK_BASE_GIB + parameters * (2 * BYTES[learner.dtype] + sharded) / GIB
    needs = [
        Need(
            "all",
            "memory, GiB",
            actors.count * actor_gib + learner.ranks * rank_gib + STORE_GIB,
            memory,
            "actors.count, actors.kv_cache_gib or learner.ranks",
        ),
    ]
    if config.run.device == "cpu":
        needs += [
            Need("rollout", "threads", actors.count * actors.threads, cores, "actors.count or actors.threads"),
            Need(
                "learning",
                "threads",
                learner.ranks * learner.threads,
                cores,
                "learner.ranks or learner.threads",
            ),
        ]
    return needs


def check(needs: Sequence[Need]) -> None:
    """Raises ConfigError for the first need beyond the machine's."""
    for need in needs:
        if not need.fits:
            raise ConfigError(
                f"{need.field}: the {need.phase} phase needs {need.amount:.4g} {need.what}, "
                f"this machine has {need.available:.4g}; lower one of them"
            )


def parameter_count(model: Path) -> int:
    """Elements of all tensors in a folder's safetensors files, from their headers."""
    total = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                elements = 1
                for size in tensor["shape"]:
                    elements *= size
                total += elements
    return total
