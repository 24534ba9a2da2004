"""One rank of a learner without Ray: runs the jobs of a JSON file one after another.

Usage: learner_child.py RANK RANKS JOBS. A job says how the policy is partitioned, where it starts, which
training steps it makes and where the result is saved.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from learners.rank_settings import RankSettings, learner_environment
from rlsys.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from rlsys.types import Demonstration, Prompt, Trajectory, TrajectoryGroup, VersionSpan

PROMPT = 10
TEMPERATURE = 0.8
KL_COEF = 0.01


def rows(rng: np.random.Generator, count: int) -> list[Demonstration]:
    lengths = rng.integers(20, 60, count)
    return [
        Demonstration(token_ids=rng.integers(3, 60, n).astype(np.int32), loss_mask=np.arange(n) >= PROMPT)
        for n in lengths
    ]


def groups(rng: np.random.Generator, count: int, size: int) -> list[TrajectoryGroup]:
    return [_group(rng, size) for _ in range(count)]


def _group(rng: np.random.Generator, size: int) -> TrajectoryGroup:
    trajectories = tuple(
        Trajectory(
            token_ids=row.token_ids,
            loss_mask=row.loss_mask,
            behavior_logprobs=np.where(row.loss_mask, -4.0, 0.0).astype(np.float32),
            versions=(VersionSpan(start=PROMPT, version=0),),
            finish_reason="stop",
            reward=float(number % 2),
            outcome="ok",
            answered=True,
        )
        for number, row in enumerate(rows(rng, size))
    )
    prompt = Prompt(prompt_id="p", token_ids=trajectories[0].token_ids[:PROMPT], answer="")
    return TrajectoryGroup(prompt=prompt, trajectories=trajectories)


def online_groups(step: int) -> list[TrajectoryGroup]:
    """What an online step trains on; follows from the step."""
    return groups(np.random.default_rng(step), 5, 4)


def train(policy: Any, job: dict[str, Any]) -> None:
    """Steps first..last-1: even ones supervised, odd ones online. `save`: folders by number of finished steps."""
    figures: dict[str, float] = {}
    for step in range(job["first"], job["last"]):
        if step % 2 == 0:
            figures |= policy.train_supervised(rows(np.random.default_rng(step), 13), step + 1)
        else:
            figures |= policy.train_online(online_groups(step), job.get("updates", 2), step + 1)
        folder = job["save"].get(str(step + 1))
        if folder:
            save(policy, Path(folder), figures)


def save(policy: Any, folder: Path, figures: dict[str, float]) -> None:
    (folder / "policy").mkdir(parents=True, exist_ok=True)
    (folder / "learner").mkdir(exist_ok=True)
    policy.save(folder)
    if policy.settings.rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))


def run(policy: Any, job: dict[str, Any]) -> None:
    earlier = weakref.ref(policy.module) if policy.module is not None else lambda: None
    # Small micro-batches: several of them, unequal in size, and one rank gets a padding one.
    learner = LearnerConfig(**{"ranks": policy.settings.ranks, "micro_batch_tokens": 256, **job["learner"]})
    policy.settings = replace(policy.settings, learner=learner)
    resume = Path(job["resume"]) if job.get("resume") else None
    start = resume / "policy" if resume else Path(job["model"])
    optimizer = OptimizerConfig(
        **{"learning_rate": 1e-3, "warmup_updates": 2, "schedule": "linear", **job.get("optimizer", {})}
    )
    policy.start_stage(start, optimizer, 100, resume, Path(job.get("reference", job["model"])))
    assert earlier() is None, "the model of the earlier stage is still in memory"
    train(policy, job)


def main(rank: int, ranks: int, jobs_file: Path) -> None:
    jobs = json.loads(jobs_file.read_text())
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(learner_environment(LearnerConfig(ranks=ranks), "cpu", rank))
    from learners.deepspeed_engine import PolicyEngine

    settings = RankSettings(
        rank=rank,
        ranks=ranks,
        device="cpu",
        store=str(jobs_file.with_suffix(".store")),
        seed=0,
        pad_token_id=0,
        temperature=TEMPERATURE,
        max_tokens=60,
        learner=LearnerConfig(ranks=ranks),
        objective=ObjectiveConfig(kl_coef=KL_COEF),
    )
    policy = PolicyEngine(settings)
    for job in jobs:
        run(policy, job)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
